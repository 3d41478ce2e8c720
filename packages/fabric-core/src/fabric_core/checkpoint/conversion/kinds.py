"""Telling by its form what a value at the top level of a checkpoint is the state of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

KINDS: Final = ("module", "optimizer", "tensor")
_EXTRA_STATE: Final = "_extra_state"  # how torch calls what a module adds to its tensors


def kind_of(value: Any, tensor: type | tuple[type, ...]) -> str | None:
    """``module``, ``optimizer`` or ``tensor``; ``None`` for anything else. ``tensor`` is what tensors are here.

    A module's state is told from other dicts by holding tensors under names and nothing else, but for the extra state
    that modules may add.
    """
    if isinstance(value, tensor):
        return "tensor"
    if not isinstance(value, Mapping):
        return None
    if "param_groups" in value and isinstance(value.get("state"), Mapping):
        return "optimizer"
    return "module" if tensors_of(value, tensor) and not _others(value, tensor) else None


def tensors_of(value: Mapping[Any, Any], tensor: type | tuple[type, ...]) -> dict[str, Any]:
    """The tensors of a module's state."""
    return {key: entry for key, entry in value.items() if isinstance(key, str) and isinstance(entry, tensor)}


def _others(value: Mapping[Any, Any], tensor: type | tuple[type, ...]) -> bool:
    return any(
        not isinstance(key, str) or not (isinstance(entry, tensor) or _is_extra_state(key))
        for key, entry in value.items()
    )


def _is_extra_state(key: Any) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] == _EXTRA_STATE
