"""Which part of a tensor a process holds, and where parts overlap."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fabric_core.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Box:
    """A part of a tensor: the position of its first element, and its extent."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def is_dtensor(value: object) -> bool:
    """Whether the value is a DTensor. Nothing is imported to tell: without ``torch.distributed.tensor`` none exists."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """The memory that this process holds of ``tensor``, and which part of the whole it is."""
    if not is_dtensor(tensor):
        return tensor.detach(), Box((0,) * tensor.dim(), tuple(tensor.shape))
    dtensor: Any = tensor.detach()
    return dtensor.to_local(), box_of(dtensor)


def box_of(dtensor: Any) -> Box:
    """Which part of a DTensor this process holds; an empty one if it does not belong to the mesh.

    ``UnsupportedError`` if it is no box: sums that are not reduced yet, and rows that do not follow each other.
    """
    offsets, sizes = [0] * dtensor.dim(), list(dtensor.shape)
    coordinate = dtensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Box(tuple(offsets), (0,) * max(1, len(sizes)))
    for dim in range(len(sizes)):
        for axis in _axes_of(dtensor, dim):
            # As torch.chunk cuts: all pieces as large as the first, except at the end.
            step = -(-sizes[dim] // dtensor.device_mesh.size(axis))
            first = min(step * coordinate[axis], sizes[dim])
            offsets[dim] += first
            sizes[dim] = min(step, sizes[dim] - first)
    return Box(tuple(offsets), tuple(sizes))


def _axes_of(dtensor: Any, dim: int) -> list[int]:
    """The axes of the mesh that cut a dim of the tensor, first cut first.

    Usually they do so in the mesh's order. Where FSDP cuts what tensor parallelism has cut before, though its axis
    comes first, the placement has a ``split_factor``: into how many pieces the dim was cut already.
    """
    order: list[int] = []
    for axis in reversed(range(len(dtensor.placements))):
        placement = dtensor.placements[axis]
        if not placement.is_replicate() and not hasattr(placement, "dim"):
            raise UnsupportedError(
                f"A tensor with the placements {dtensor.placements} cannot be stored or filled: {placement} means "
                "that the ranks hold summands. Call tensor.redistribute(placements=...) first."
            )
        if getattr(placement, "dim", None) != dim:
            continue
        pieces, position = getattr(placement, "split_factor", 1), 0
        while pieces > 1 and position < len(order):
            pieces /= dtensor.device_mesh.size(order[position])
            position += 1
        if pieces != 1:
            raise UnsupportedError(
                f"A tensor with the placements {dtensor.placements} on a mesh of {tuple(dtensor.device_mesh.shape)} "
                "cannot be stored or filled: what a rank holds is not in one piece. Call tensor.redistribute(...) "
                "first."
            )
        order.insert(position, axis)
    return order


def overlap(first: Box, second: Box) -> Box | None:
    """The part that both have in common, in the coordinates of the whole; ``None`` if there is none."""
    offsets = tuple(map(max, first.offsets, second.offsets))
    ends = (
        min(a + n, b + m) for a, n, b, m in zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
    )
    sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return None if any(size <= 0 for size in sizes) else Box(offsets, sizes)


def relative(box: Box, origin: Sequence[int]) -> Box:
    """The box in coordinates that begin at ``origin``."""
    return Box(tuple(a - b for a, b in zip(box.offsets, origin, strict=True)), box.sizes)


def part_of(tensor: Tensor, box: Box) -> Tensor:
    """A view of the part of ``tensor`` that the box names."""
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def volume(sizes: Sequence[int]) -> int:
    """How many elements."""
    return torch.Size(sizes).numel()
