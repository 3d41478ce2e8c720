"""What was asked for: the arguments of ``Fabric(...)`` merged with the environment, each value with its origin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from fabric_core import settings
from fabric_core.errors import FabricError, InvalidArgumentError
from fabric_core.precision.names import full_name
from fabric_core.settings import Setting

DEFAULTS: Final[dict[str, Any]] = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "precision": None,
    "checkpoint_io": None,
}
VARIABLES: Final[dict[str, Setting]] = {
    "accelerator": settings.ACCELERATOR,
    "strategy": settings.STRATEGY,
    "devices": settings.DEVICES,
    "num_nodes": settings.NUM_NODES,
    "precision": settings.PRECISION,
}


@dataclass(frozen=True)
class Asked:
    """A value and who asked for it.

    Attributes:
        value: as it was passed.
        origin: words for messages, such as ``argument devices=2`` or ``LT_DEVICES=2``.
        given: False if the value is merely the default.
    """

    value: Any
    origin: str
    given: bool


@dataclass(frozen=True)
class Request:
    """Everything that was asked for, nothing decided."""

    accelerator: Asked
    strategy: Asked
    devices: Asked
    num_nodes: Asked
    precision: Asked
    checkpoint_io: Asked
    plugins: tuple[Any, ...]
    interactive: bool

    @classmethod
    def gather(cls, arguments: dict[str, Any], plugins: Any = None) -> Request:
        """Merge ``arguments`` (one for each name in ``DEFAULTS``) with the environment.

        Raises:
            ValueError: under ``fabric run``, an argument in code contradicts an option that was typed.
        """
        asked = {name: _merge(name, arguments[name]) for name in DEFAULTS}
        return cls(**asked, plugins=_as_tuple(plugins), interactive=is_interactive())


@contextmanager
def naming(asked: Asked) -> Iterator[None]:
    """Errors raised inside, over a value that came from a variable, name the variable."""
    try:
        yield
    except (FabricError, ValueError, TypeError, RuntimeError) as error:
        name = asked.origin.partition("=")[0]
        if not any(name == variable.name for variable in VARIABLES.values()) or asked.origin in str(error):
            raise
        message = f"{error} The environment asked for it: {asked.origin}."
        raise type(error)(message) from error


def _merge(name: str, value: Any) -> Asked:
    default, variable = DEFAULTS[name], VARIABLES.get(name)
    given = not (value is default or (isinstance(value, str) and value == default) or _same_int(value, default))
    text = variable.text() if variable is not None else None
    if variable is None or text is None:
        return Asked(value, f"{name}={value!r}" if given else "default", given)
    origin = f"{variable.name}={text}"
    if given and settings.CLI_USED.flag() and not _agree(name, value, text):
        raise InvalidArgumentError(
            f"{name} is set twice: Fabric({name}={value!r}) in code, and {name}={text!r} by `fabric run` "
            f"({variable.name}). Remove one of them."
        )
    return Asked(text, origin, True)


def _same_int(value: Any, default: Any) -> bool:
    return isinstance(value, int) and isinstance(default, int) and not isinstance(value, bool) and value == default


def _agree(name: str, value: Any, text: str) -> bool:
    if name == "precision":
        return full_name(value) == full_name(text)
    return str(value).lower() == text.lower()


def _as_tuple(plugins: Any) -> tuple[Any, ...]:
    if plugins is None:
        return ()
    return tuple(plugins) if isinstance(plugins, (list, tuple, set, frozenset)) else (plugins,)


def is_interactive() -> bool:
    """Whether this is a Python prompt or a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
