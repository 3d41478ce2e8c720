"""Calling a named hook on every callback that has it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

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
        hook(*args, **_accepted(hook, kwargs))


def _accepted(hook: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(hook).parameters
    except (ValueError, TypeError):  # some builtins show no signature: trust the caller
        return kwargs
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
