"""Tensors of which each rank holds a part, as places to load into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fabric_core.checkpoint.sharded.boxes import box_of, is_dtensor, part_of, volume


def local_of(tensor: Tensor) -> Tensor:
    """The memory of this rank: its part of a tensor that is spread, the tensor itself otherwise.

    It is complete: what another rank is still sending is waited for. Writing to it writes to ``tensor``.
    """
    if not is_dtensor(tensor):
        return tensor.detach()
    dtensor: Any = tensor
    with torch.no_grad():
        local: Any = dtensor.to_local()
    wait = getattr(local, "wait", None)  # the result of a collective that may still be running
    memory: Tensor = local if wait is None else wait()
    return memory.detach()


def part_for(whole: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """The part of ``whole`` that belongs on this rank, and the memory in ``destination`` that it belongs in.

    Both are empty where the rank holds nothing. The part is a view. ``UnsupportedError`` as ``box_of`` raises it.
    """
    if not is_dtensor(destination):
        return whole, destination
    local, box = local_of(destination), box_of(destination)
    if not volume(box.sizes):  # a rank outside of the mesh has not even the right number of dimensions
        return whole.new_empty(local.shape), local
    return part_of(whole, box), local


def empty_like(parameter: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """New memory laid out as the DTensor ``parameter`` if it has its shape, else the whole on each rank of its mesh."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    from torch.distributed.tensor import DTensor, Replicate

    local = torch.empty(shape, dtype=dtype, device=local_of(parameter).device)
    mesh = parameter.device_mesh
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
