"""What the running program registers by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fabric_core.errors import InvalidTypeError
from fabric_core.registry.ref import PluginRef, name_key


@dataclass(frozen=True, eq=False)
class Registration:
    """One call of ``register``; two equal calls are two registrations."""

    ref: PluginRef
    target: Callable[..., Any] | str


class Runtime:
    """Registrations by kind and name. The last one that was not undone counts."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[str, str], list[Registration]] = {}

    def add(self, kind: str, name: str, target: Callable[..., Any] | str) -> Callable[[], None]:
        """Register; call the result to undo, in any order and as often as you like."""
        registration = Registration(replace(direct_ref(kind, target), name=name), target)
        key = (kind, name_key(name))
        self._stacks.setdefault(key, []).append(registration)

        def undo() -> None:
            stack = self._stacks.get(key, [])
            if registration in stack:
                stack.remove(registration)
            if not stack:
                self._stacks.pop(key, None)

        return undo

    def get(self, kind: str, name: str) -> Registration | None:
        """The registration that counts for the name."""
        stack = self._stacks.get((kind, name_key(name)))
        return stack[-1] if stack else None

    def find(self, kind: str, name: str) -> PluginRef | None:
        """The reference that counts for the name."""
        registration = self.get(kind, name)
        return None if registration is None else registration.ref

    def refs(self, kind: str) -> list[PluginRef]:
        """What counts for each name of the kind."""
        return [stack[-1].ref for (its_kind, _), stack in list(self._stacks.items()) if its_kind == kind and stack]

    def keys(self) -> frozenset[tuple[str, str]]:
        """Kind and key of every registered name."""
        return frozenset(self._stacks)


def direct_ref(kind: str, target: Callable[..., Any] | str) -> PluginRef:
    """A reference to an object that was given instead of a name, or to an import string."""
    if isinstance(target, str):
        return PluginRef(kind, target, target)
    if not callable(target):
        raise InvalidTypeError(
            f"target={target!r} cannot be registered: pass a class, a function that makes the object, "
            'or the text "package.module:Class".'
        )
    named = target if hasattr(target, "__qualname__") else type(target)
    return PluginRef(kind, named.__name__, f"{named.__module__}:{named.__qualname__}")
