"""One decision of a plan, with where it came from and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fabric_core.registry import PluginRef

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What was chosen.

    Attributes:
        value: the object itself.
        name: how it is called: a registered name, a count, a class.
        origin: who asked for it: an argument, a variable, or nobody (``"auto"``).
        reason: why this one, where nobody asked for it by name.
        ref: the plugin behind it; ``None`` for an object made in code.
    """

    value: T
    name: str
    origin: str
    reason: str = ""
    ref: PluginRef | None = None

    @property
    def plugin(self) -> str:
        """The distribution and version that provide it, empty where none does."""
        return "" if self.ref is None else plugin_text(self.ref)

    def row(self) -> dict[str, Any]:
        """The decision without the object, for printing."""
        return {"value": self.name, "origin": self.origin, "reason": self.reason, "plugin": self.plugin}


def plugin_text(ref: PluginRef) -> str:
    """``"distribution version"`` of a reference, empty for what was registered in code."""
    return " ".join(part for part in (ref.dist, ref.version) if part)
