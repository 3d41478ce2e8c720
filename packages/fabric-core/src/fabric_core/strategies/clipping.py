"""Clipping gradients by their norm, with the check for infinite norms before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fabric_core.errors import UsageError


def clip_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; return the norm before, shape ``()``.

    Raises:
        RuntimeError: the norm is NaN or infinite and ``error_if_nonfinite``; the gradients are untouched then.
    """
    having = [p for p in parameters if p.grad is not None]
    with torch.no_grad():
        total = get_total_norm([p.grad for p in having if p.grad is not None], norm_type)
        if error_if_nonfinite and not math.isfinite(total.item()):
            raise UsageError(
                f"The {norm_type:g}-norm of the gradients is {total.item()}, so they cannot be clipped to {max_norm}. "
                "The loss has diverged or overflowed: lower the learning rate, or pass error_if_nonfinite=False to "
                "go on regardless."
            )
        clip_grads_with_norm_(having, max_norm, total)
    return total
