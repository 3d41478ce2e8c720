"""The plug-in objects that were passed instead of names: in ``plugins=`` and inside a strategy object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fabric_core.abc.accelerator import Accelerator
from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.abc.precision import Precision
from fabric_core.abc.strategy import Strategy
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.resolve.request import Asked, Request

_KINDS: dict[str, type] = {
    "precision": Precision,
    "checkpoint_io": CheckpointIO,
    "environment": ClusterEnvironment,
}
_WORDS = {"precision": "Precision", "checkpoint_io": "CheckpointIO", "environment": "ClusterEnvironment"}

_NAMED = ("accelerator", "precision", "checkpoint_io")  # they have an argument of their own


@dataclass(frozen=True)
class Given:
    """An object and the words for where it was passed."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Objects:
    """At most one object of each kind; ``None`` where a name or a default has to be resolved."""

    accelerator: Given | None = None
    precision: Given | None = None
    checkpoint_io: Given | None = None
    environment: Given | None = None
    devices: Given | None = None


def collect_objects(request: Request) -> Objects:
    """The objects passed, after checking that no kind is given twice.

    Raises:
        TypeError: something in ``plugins`` is of no known kind.
        ValueError: one kind is given twice; the message names both places.
    """
    found = _from_plugins(request.plugins)
    for kind in ("precision", "checkpoint_io"):
        asked: Asked = getattr(request, kind)
        if asked.given and kind in found:
            raise _twice(kind, asked.origin, found[kind].origin, found[kind].value)
    strategy = request.strategy.value
    if isinstance(strategy, Strategy):
        for kind, given in given_in(strategy).items():
            _check_not_twice(kind, given, request, found)
            found[kind] = given
    if isinstance(request.accelerator.value, Accelerator) and "accelerator" not in found:
        found["accelerator"] = Given(request.accelerator.value, "argument accelerator")
    return Objects(**found)


def _from_plugins(plugins: tuple[Any, ...]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    for plugin in plugins:
        kind = next((kind for kind, cls in _KINDS.items() if isinstance(plugin, cls)), None)
        if kind is None:
            hint = " Pass an instance, not the class." if isinstance(plugin, type) else ""
            hint = hint or (" A name is passed as precision= or checkpoint_io=." if isinstance(plugin, str) else "")
            raise InvalidTypeError(
                f"plugins={plugin!r}: expected instances of {', '.join(_WORDS.values())}.{hint} Accelerators, "
                "strategies and loggers have arguments of their own."
            )
        if kind in found:
            raise InvalidArgumentError(
                f"plugins= holds two of the kind {_WORDS[kind]}: {type(found[kind].value).__name__} and "
                f"{type(plugin).__name__}. Keep one."
            )
        found[kind] = Given(plugin, f"plugins=[{type(plugin).__name__}(...)]")
    return found


def given_in(strategy: Strategy) -> dict[str, Given]:
    """What the user put into the strategy object, by kind; not what an earlier ``Fabric(...)`` put there."""
    name = type(strategy).__name__
    held = {
        "accelerator": strategy.accelerator,
        "precision": strategy.precision if getattr(strategy, "has_own_precision", False) else None,
        "checkpoint_io": strategy.checkpoint_io if getattr(strategy, "has_own_checkpoint_io", False) else None,
        "environment": getattr(strategy, "cluster_environment", None),
        "devices": getattr(strategy, "parallel_devices", None) or getattr(strategy, "given_device", None),
    }
    words = {
        "environment": "cluster_environment",
        "devices": "parallel_devices" if hasattr(strategy, "parallel_devices") else "device",
    }
    return {
        kind: Given(value, f"{name}({words.get(kind, kind)}=...)")
        for kind, value in held.items()
        if value is not None and strategy.resolved.get(kind) is not value
    }


def _check_not_twice(kind: str, given: Given, request: Request, found: dict[str, Given]) -> None:
    if kind in found and found[kind].value is not given.value:
        raise _twice(kind, found[kind].origin, given.origin, given.value)
    asked: Asked | None = getattr(request, kind) if kind in _NAMED else None
    if asked is not None and asked.given and asked.value is not given.value:
        raise _twice(kind, asked.origin, given.origin, given.value)


def _twice(kind: str, first: str, second: str, value: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{kind} is given twice: {first} and {second}, which is a {type(value).__name__}. Keep one of them."
    )
