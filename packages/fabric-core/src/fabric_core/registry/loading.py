"""Turns a reference into the object it means."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from fabric_core.errors import PluginLoadError
from fabric_core.registry.contract import check_level
from fabric_core.registry.ref import PluginRef
from fabric_core.registry.switches import trace


def import_value(value: str) -> Any:
    """The object that ``"module:attribute.path"``, or a mere ``"module"``, stands for."""
    module, _, path = value.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in path.split(".") if path else ():
        found = getattr(found, attribute)
    return found


def load(ref: PluginRef) -> Callable[..., Any]:
    """Import the one target of a reference; its contract level fits and it can be called.

    ``PluginLoadError`` with the original error chained, ``IncompatiblePluginError``.
    """
    start = time.perf_counter()
    try:
        target = import_value(ref.value)
    except Exception as error:  # a plugin's module may raise anything
        raise PluginLoadError(
            f"{ref} is found, but importing {ref.value!r} failed with {type(error).__name__}: {error}"
        ) from error
    trace(f"{ref}: imported {ref.value} in {1000 * (time.perf_counter() - start):.1f} ms")
    return checked(target, ref)


def checked(target: Any, ref: PluginRef) -> Callable[..., Any]:
    """The target itself; its contract level fits and it can be called."""
    check_level(target, ref)
    if not callable(target):
        raise PluginLoadError(
            f"{ref} is found, but {ref.value!r} is a {type(target).__name__}, not a class or a function: "
            'its entry point must read "module:Class".'
        )
    return target  # type: ignore[no-any-return]
