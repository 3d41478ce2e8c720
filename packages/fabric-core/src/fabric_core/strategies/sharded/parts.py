"""This process's part of a tensor that is split over a device mesh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement


def local_of(tensor: Tensor) -> Tensor:
    """The memory that this process holds of ``tensor``: the tensor itself unless it is a ``DTensor``.

    Writing to what is returned writes to ``tensor``.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
    wait = getattr(local, "wait", None)  # the result of a collective that may still be running
    return local if wait is None else wait()


def part_of(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """The part of ``whole``, which every process holds, that belongs to this process; a view where that is possible.

    Sizes that do not divide are cut as ``torch.chunk`` cuts them, so that the last processes may hold nothing.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return whole.new_empty(0)
    part = whole
    for mesh_dim in _cutting_order(placements):
        dim = placements[mesh_dim].dim  # type: ignore[attr-defined]
        chunks, mine = part.chunk(mesh.size(mesh_dim), dim), coordinate[mesh_dim]
        part = chunks[mine] if mine < len(chunks) else part.narrow(dim, 0, 0)
    return part


def _cutting_order(placements: Sequence[Placement]) -> list[int]:
    """Mesh dimensions that split, in the order of the cuts.

    ``fully_shard`` over a tensor that is split already cuts each part again, although its mesh dimension comes first:
    such a strided placement is applied last.
    """
    splitting = [i for i, placement in enumerate(placements) if hasattr(placement, "dim")]
    return sorted(splitting, key=lambda i: (type(placements[i]) is not Shard, i))
