"""Clipping gradients: DeepSpeed does it in its step, so the limit is set for the next one, and the norm told now."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fabric_core.errors import InvalidArgumentError, UnsupportedError, UsageError
from fabric_deepspeed.backend import kept_elsewhere
from fabric_deepspeed.engine import Engine
from fabric_deepspeed.gradients import Gradients


def clips_in_its_step(gradients: Gradients) -> bool:
    """Whether DeepSpeed's optimizer clips; where torch's own is used, gradients are whole and at hand."""
    return hasattr(gradients.engine.optimizer, "clip_grad")


def clip_next_step(gradients: Gradients, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Have the engine's next step clip to ``max_norm``; return the norm now, in float32, shape ``()``.

    Every rank calls it, and gets the same. An overflow under dynamic loss scaling is no error: the step is skipped.

    Raises:
        NotImplementedError: another norm than the 2-norm.
        RuntimeError: the norm is NaN or infinite and ``error_if_nonfinite``; nothing is set then.
    """
    if norm_type != 2.0:
        raise UnsupportedError(
            f"fabric.clip_gradients(norm_type={norm_type:g}): DeepSpeed's ZeRO optimizers clip by the 2-norm alone. "
            "Leave norm_type away."
        )
    if not max_norm > 0:
        raise InvalidArgumentError(f"fabric.clip_gradients(max_norm={max_norm}): expected a positive number.")
    engine = gradients.engine
    if not gradients.managed:
        raise UnsupportedError(
            'fabric.clip_gradients(): with "managed_gradient_accumulation": false DeepSpeed exchanges gradients in its '
            'step, so that their norm is not known before. Leave that setting away, or set "gradient_clipping" in its '
            "config."
        )
    gradients.complete("fabric.clip_gradients()")
    norm = _norm(engine.optimizer)
    if error_if_nonfinite and not _skips_overflow(engine) and not math.isfinite(norm.item()):
        raise UsageError(
            f"The 2-norm of the gradients is not finite, so they cannot be clipped to {max_norm}. The loss has "
            "diverged or overflowed: lower the learning rate, or pass error_if_nonfinite=False to go on regardless."
        )
    gradients.undo_clipping = _set_limit(engine.optimizer, max_norm, gradients.undo_clipping)
    return norm


def _set_limit(optimizer: Any, max_norm: float, undo: Callable[[], None] | None) -> Callable[[], None]:
    before = optimizer.clip_grad
    optimizer.clip_grad = max_norm
    if undo is not None:  # called twice before a step: the first one knows what was there
        return undo

    def put_back() -> None:
        optimizer.clip_grad = before

    return put_back


def _skips_overflow(engine: Engine) -> bool:
    return bool(engine.fp16_enabled())


def _norm(optimizer: Any) -> Tensor:
    """The norm of the whole gradients, at their true scale. DeepSpeed writes -1 where it is not finite."""
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        scaled = optimizer.scaled_global_norm()
    elif hasattr(optimizer, "_get_norm_groups"):  # stage 3
        scaled = _combined(optimizer._get_norm_groups())
    elif hasattr(optimizer, "get_grads_for_norm"):  # stage 1 that accumulates bfloat16 gradients in float32
        return _of_whole(optimizer.get_grads_for_norm()[0])
    elif hasattr(optimizer, "dp_process_group"):  # partitions
        raise kept_elsewhere("the norm of its gradients")
    else:  # stage 0 with parameters in 16 bits
        scaled = _of_whole([p.grad for group in optimizer.fp16_groups for p in group if p.grad is not None])
    norm = torch.as_tensor(scaled, dtype=torch.float32) / optimizer.loss_scale
    return torch.where(norm >= 0, norm, math.inf)


def _combined(norms: list[Any]) -> Tensor:
    parts = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms])
    return torch.where((parts >= 0).all(), torch.linalg.vector_norm(parts), -1.0)


def _of_whole(grads: list[Tensor]) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total
