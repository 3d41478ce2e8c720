"""Calling a named hook on every callback that has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fabric_core.keywords import accepted
from fabric_core.rank_zero import rank_zero_warn


def call_hook(callbacks: Iterable[Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call ``name`` on each callback that has it, in order; keywords that its signature does not take are left out."""
    for callback in callbacks:
        hook = getattr(callback, name, None)
        if hook is None:
            continue
        if not callable(hook):
            rank_zero_warn(
                f"{type(callback).__name__}.{name} is a {type(hook).__name__}, not a method, so fabric.call() skips it."
            )
            continue
        hook(*args, **accepted(hook, kwargs))
