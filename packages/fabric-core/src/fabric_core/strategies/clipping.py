"""Clipping gradients by norm and by value, with the check for infinite norms before anything is changed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fabric_core.errors import UsageError


def clip_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; return the norm before, shape ``()``.

    Gradients may be split over processes (``DTensor``), also over different meshes: the norm is that of the whole
    gradients. Every rank that holds a part calls it then.

    Raises:
        RuntimeError: the norm is NaN or infinite and ``error_if_nonfinite``; the gradients are untouched then.
    """
    having = [p for p in parameters if p.grad is not None]
    with torch.no_grad():
        if _any_split(having):
            from fabric_core.strategies.sharded.clipping import scale_parts, total_norm

            total = total_norm(having, norm_type)
            _check(total, max_norm, norm_type, error_if_nonfinite)
            scale_parts(having, max_norm, total)
            return total
        total = get_total_norm([p.grad for p in having if p.grad is not None], norm_type)
        _check(total, max_norm, norm_type, error_if_nonfinite)
        clip_grads_with_norm_(having, max_norm, total)
    return total


def clip_value(parameters: Iterable[Tensor], limit: float) -> None:
    """Limit each gradient element to ``[-limit, limit]``; of a ``DTensor`` each process limits its part."""
    having = [p for p in parameters if p.grad is not None]
    if _any_split(having):
        from fabric_core.strategies.sharded.clipping import clamp_parts

        clamp_parts(having, limit)
    elif having:  # torch fails on none
        nn.utils.clip_grad_value_(having, clip_value=limit)


def _check(total: Tensor, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise UsageError(
            f"The {norm_type:g}-norm of the gradients is {total.item()}, so they cannot be clipped to {max_norm}. "
            "The loss has diverged or overflowed: lower the learning rate, or pass error_if_nonfinite=False to "
            "go on regardless."
        )


def _any_split(having: list[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is no DTensor
    return module is not None and any(isinstance(p.grad, module.DTensor) for p in having)
