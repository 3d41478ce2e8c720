"""Where checkpoints go: the object given, or the one that a name stands for. Otherwise the strategy decides."""

from __future__ import annotations

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.errors import InvalidTypeError
from fabric_core.registry import Registry
from fabric_core.resolve.choice import Choice, plugin_text
from fabric_core.resolve.objects import Objects
from fabric_core.resolve.request import Request


def choose_checkpoint_io(request: Request, objects: Objects, registry: Registry) -> Choice[CheckpointIO] | None:
    """The checkpoint IO, ``None`` if nothing was asked for.

    Raises:
        TypeError: neither a name, a ``CheckpointIO`` nor a subclass.
        ValueError: an unknown name.
    """
    if objects.checkpoint_io is not None:
        given = objects.checkpoint_io
        return Choice(given.value, type(given.value).__name__, given.origin)
    asked = request.checkpoint_io
    wanted = asked.value
    if wanted is None:
        return None
    if isinstance(wanted, CheckpointIO):
        name = type(wanted).__name__
        return Choice(wanted, name, f"argument checkpoint_io={name}(...)")
    if isinstance(wanted, type) and issubclass(wanted, CheckpointIO):
        return Choice(registry.create("checkpoint_io", wanted), wanted.__name__, asked.origin)
    if not isinstance(wanted, str):
        raise InvalidTypeError(
            f"checkpoint_io={wanted!r} ({type(wanted).__name__}): expected a name such as "
            f"{', '.join(map(repr, registry.names('checkpoint_io')))}, or a CheckpointIO."
        )
    ref = registry.find("checkpoint_io", wanted.strip())
    io = registry.create("checkpoint_io", ref)
    if not isinstance(io, CheckpointIO):
        raise InvalidTypeError(
            f"checkpoint_io={wanted!r} ({plugin_text(ref)}) made a {type(io).__name__}, which is no "
            "fabric_core.abc.CheckpointIO. This is a defect of that plugin."
        )
    return Choice(io, ref.name, asked.origin, "", ref)
