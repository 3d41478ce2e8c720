"""Looking up and setting keys in a nested dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from fabric_core.errors import InvalidTypeError
from fabric_deepspeed.config.keywords import Path

AUTO: Final = "auto"


def lookup(document: Mapping[str, Any], path: Path) -> Any:
    """The value at a path; ``None`` if there is none, or no section on the way to it."""
    found: Any = document
    for name in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def stated(document: Mapping[str, Any], path: Path) -> Any:
    """As ``lookup``, with ``None`` for ``"auto"`` too: it says that the value is up to somebody else."""
    found = lookup(document, path)
    return None if isinstance(found, str) and found == AUTO else found


def put(document: dict[str, Any], path: Path, value: Any) -> None:
    """Set the value at a path; sections on the way are made."""
    *sections, last = path
    for name in sections:
        if document.get(name) is None:
            document[name] = {}
        document = document[name]
    document[last] = value


def remove(document: dict[str, Any], path: Path) -> None:
    """Remove the value at a path that exists."""
    *sections, last = path
    for name in sections:
        document = document[name]
    del document[last]


def autos(document: Mapping[str, Any], above: Path = ()) -> Iterator[Path]:
    """The paths of all values that are ``"auto"``."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from autos(value, (*above, name))
        elif isinstance(value, str) and value == AUTO:
            yield (*above, name)


def check_sections(document: Mapping[str, Any], *names: str) -> None:
    """``InvalidTypeError`` if one of the sections is there and no dictionary."""
    for name in names:
        section = document.get(name)
        if section is not None and not isinstance(section, Mapping):
            raise InvalidTypeError(f"{name}={section!r} in DeepSpeed's configuration: expected a dictionary.")
