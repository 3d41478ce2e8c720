"""One decision of a plan, with where it came from and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What was chosen.

    Attributes:
        value: the object itself.
        name: how it is called: a registered name, a count, a class.
        origin: who asked for it: an argument, a variable, or nobody (``"auto"``).
        reason: why this one, where nobody asked for it by name.
        plugin: the distribution and version that provide it, empty where none does.
    """

    value: T
    name: str
    origin: str
    reason: str = ""
    plugin: str = ""

    def row(self) -> dict[str, Any]:
        """The decision without the object, for printing."""
        return {"value": self.name, "origin": self.origin, "reason": self.reason, "plugin": self.plugin}


def plugin_text(ref: Any) -> str:
    """``"distribution version"`` of a registry reference, empty for what was registered in code."""
    return " ".join(part for part in (ref.dist, ref.version) if part)
