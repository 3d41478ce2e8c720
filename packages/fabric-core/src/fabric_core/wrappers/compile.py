"""Seeing through ``torch.compile``, without importing it and without replacing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fabric_core.warnings import possible_user_warning

T = TypeVar("T")


def is_compiled(obj: object) -> bool:
    """Whether ``obj`` is what ``torch.compile(module)`` returned."""
    dynamo = sys.modules.get("torch._dynamo")  # not imported: then nothing can be compiled
    return dynamo is not None and isinstance(obj, dynamo.OptimizedModule)


def unwrap_compiled(obj: T) -> tuple[T, Callable[[nn.Module], nn.Module] | None]:
    """The module inside, and a function that compiles another one with the same settings (``None`` if not compiled)."""
    if not is_compiled(obj):
        return obj, None
    inner: Any = obj
    # The context is the decorator that torch.compile applied: it holds backend, mode and options. Should a release of
    # torch keep it elsewhere, the module can still be unwrapped, and compiling again is left to the user.
    return inner._orig_mod, getattr(inner, "dynamo_ctx", None) or _left_to_the_user


def _left_to_the_user(module: nn.Module) -> nn.Module:
    possible_user_warning(
        f"torch {torch.__version__} does not show how the module was compiled, so it is set up uncompiled. Call "
        "torch.compile on what fabric.setup() returns instead."
    )
    return module


def step_over(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run as it is where a compiled module calls it; what it calls in turn is compiled as ever."""
    stepped_over: Callable[..., Any] = torch.compiler.disable(function, recursive=False)
    return stepped_over
