"""Tensors of which each rank holds a part, as places to load into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fabric_core.checkpoint.sharded.boxes import is_dtensor, local_part, part_of


def local_of(tensor: Tensor) -> Tensor:
    """The memory of this rank: its part of a tensor that is spread, the tensor itself otherwise."""
    return local_part(tensor)[0]


def part_for(whole: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """The part of ``whole`` that belongs on this rank, and the memory in ``destination`` that it belongs in.

    Both are empty where the rank holds nothing.
    """
    if not is_dtensor(destination):
        return whole, destination
    local, box = local_part(destination)
    return part_of(whole, box), local


def empty_like(parameter: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """New memory laid out as the DTensor ``parameter`` if it has its shape, else the whole on each rank of its mesh."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    from torch.distributed.tensor import DTensor, Replicate

    local = torch.empty(shape, dtype=dtype, device=local_of(parameter).device)
    mesh = parameter.device_mesh
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
