"""Collectives on nested data in few messages: small tensors of one dtype travel together.

Twenty collectives of 64 floats cost twenty round trips. Flattened into one tensor they cost one, and two copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fabric_core.collections import apply_to_collection, for_each

TensorCollective = Callable[[Tensor], Any]
SMALL = 1 << 20
"""Tensors of more elements than this travel alone: copying them costs more than a message."""


def gather_nested(data: Any, gather: TensorCollective) -> Any:
    """``data`` with every tensor ``(...)`` replaced by ``gather(tensor)`` of shape ``(world, ...)``."""

    def together(group: list[Tensor]) -> list[Tensor]:
        flat = gather(torch.cat([t.reshape(-1) for t in group]))
        parts = flat.split([t.numel() for t in group], dim=-1)
        return [part.reshape(flat.shape[0], *t.shape) for part, t in zip(parts, group, strict=True)]

    return _map_groups(data, gather, together)


def reduce_nested(data: Any, reduce: TensorCollective) -> Any:
    """``data`` with every tensor reduced in place; the tensors keep their identity."""

    def alone(tensor: Tensor) -> Any:
        if tensor.is_contiguous():
            return reduce(tensor)
        tensor.detach().copy_(reduce(tensor.detach().contiguous()))
        return tensor

    def together(group: list[Tensor]) -> list[Tensor]:
        flat = reduce(torch.cat([t.detach().reshape(-1) for t in group]))
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))
        return group

    return _map_groups(data, alone, together)


def _map_groups(data: Any, one: TensorCollective, together: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    if isinstance(data, Tensor):
        return one(data)
    tensors: list[Tensor] = []
    for_each(data, Tensor, tensors.append)
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):  # the same order on every rank, so that messages match
        groups[index if tensor.numel() > SMALL else (tensor.dtype, tensor.device)].append(index)
    results: list[Any] = [None] * len(tensors)
    for members in groups.values():
        group = [tensors[i] for i in members]
        values = [one(group[0])] if len(group) == 1 else together(group)
        for index, value in zip(members, values, strict=True):
            results[index] = value
    order = iter(results)
    return apply_to_collection(data, Tensor, lambda _: next(order), allow_frozen=True)
