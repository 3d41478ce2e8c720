"""Collectives on one tensor. Every rank of the group calls them, in the same order, with the same shape and dtype."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_core.errors import InvalidArgumentError, InvalidTypeError

# Neither gloo nor NCCL carries these. Gathering only moves bytes, so it can do without their help.
_AS_BYTES: Final = frozenset({torch.int16, torch.uint16, torch.uint32, torch.uint64})
_OPS: Final = ("sum", "mean", "avg", "min", "max", "product", "band", "bor", "bxor")


def gather_tensor(tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
    """``(...)`` on each rank to ``(group size, ...)`` on every rank. ``sync_grads`` lets gradients flow back."""
    tensor = _dense(tensor).contiguous()
    if sync_grads and tensor.requires_grad:
        from torch.distributed.nn.functional import all_gather  # imports much of torch: only when asked for

        return torch.stack(all_gather(tensor, group if group is not None else dist.group.WORLD))
    if tensor.dtype in _AS_BYTES or (tensor.is_floating_point() and tensor.element_size() == 1):
        flat = gather_tensor(tensor.detach().reshape(-1).view(torch.uint8), group)
        return flat.view(tensor.dtype).reshape(flat.shape[0], *tensor.shape)
    out = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    dist.all_gather(list(out.unbind(0)), tensor.detach(), group=group)
    return out


def reduce_tensor(tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
    """Reduce in place over the group and return the tensor.

    Means are a sum and a division here, because gloo averages no integers; integer tensors are divided rounding down.
    """
    op, divide = _operation(reduce_op)
    alias = _dense(tensor).detach()  # the value changes in place, the autograd graph of the tensor stays out of it
    if alias.dtype is torch.bool:
        if op not in (dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
            raise InvalidTypeError(
                f"reduce_op={reduce_op!r} makes no sense for a bool tensor. Pass tensor.float() for a share, or "
                'reduce_op="min" (all) or "max" (any).'
            )
        alias = alias.view(torch.uint8)
    raw = alias.contiguous()
    dist.all_reduce(raw, op=op, group=group)
    if divide:
        size = dist.get_world_size(group)
        if raw.is_floating_point() or raw.is_complex():
            raw.div_(size)
        else:
            raw.floor_divide_(size)
    if raw.data_ptr() != alias.data_ptr():
        alias.copy_(raw)
    return tensor


def _dense(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        raise InvalidTypeError(f"Collectives take dense tensors, not one of layout {tensor.layout}: tensor.to_dense().")
    return tensor


def _operation(reduce_op: Any) -> tuple[Any, bool]:
    """The native operation, and whether to divide by the group's size afterwards."""
    if reduce_op is None:
        return dist.ReduceOp.SUM, True
    if not isinstance(reduce_op, str):
        return (dist.ReduceOp.SUM, True) if reduce_op == dist.ReduceOp.AVG else (reduce_op, False)
    word = reduce_op.lower()
    if word in ("mean", "avg"):
        return dist.ReduceOp.SUM, True
    if word not in _OPS:
        raise InvalidArgumentError(f"reduce_op={reduce_op!r} is unknown. Expected one of {', '.join(_OPS)}.")
    return getattr(dist.ReduceOp, word.upper()), False
