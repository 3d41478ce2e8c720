"""What DeepSpeed keeps on NVMe: between two steps, tensors are files, and a map of a file is a tensor.

Each of the optimizer's flat tensors that is large enough, each tensor of its state, and at stage 3 each process's part
of a parameter has a file of its own, and is empty itself. What is mapped is read when it is wanted, a page at a time,
and what is written to it is in the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fabric_core.errors import CheckpointError
from fabric_deepspeed.backend import kept_elsewhere


@dataclass(frozen=True)
class SwappedFlat:
    """A flat tensor in files, and the optimizer's state of it.

    Attributes:
        weights: the float32 weights.
        state: tensors of the optimizer's state, by key.
    """

    weights: Tensor
    state: dict[str, Tensor]
    _files: Any = field(repr=False)
    _optimizer: Any = field(repr=False)
    _flat: Tensor = field(repr=False)

    def add(self, key: str) -> Tensor:
        """The tensor of one more kind of state, zeros, for an optimizer that has not stepped yet."""
        swapper = self._optimizer.optimizer_swapper
        value = torch.empty(0, dtype=self.weights.dtype)
        value.ds_id = f"{key}-{self._flat.ds_id}"  # type: ignore[attr-defined]
        self._files.add_state_tensors([value])
        self._optimizer.optimizer.state[self._flat][key] = value
        path = self._files.tensors[-1].swap_path
        with open(path, "wb") as file:
            file.truncate(swapper._io_aligned_numel(self.weights.numel()) * self.weights.element_size())
        self.state[key] = _mapped(path, self.weights.numel(), self.weights.dtype)
        return self.state[key]


def swapped_flats(optimizer: Any) -> dict[int, SwappedFlat]:
    """The flat tensors of a stage 3 optimizer that are in files, by their numbers. No step may be under way.

    Raises:
        CheckpointError: a file is missing or too short.
        RuntimeError: this release of DeepSpeed keeps them elsewhere.
    """
    if not getattr(optimizer, "swap_optimizer", False):
        return {}
    try:
        known = optimizer.optimizer_swapper.swap_params_info
        flats = [known.get(flat.ds_id) for flat in optimizer.fp32_partitioned_groups_flat]
        return {number: _open(optimizer, number, files) for number, files in enumerate(flats) if files is not None}
    except AttributeError as error:
        raise kept_elsewhere("what it has put on NVMe") from error


def _open(optimizer: Any, number: int, files: Any) -> SwappedFlat:
    flat = optimizer.fp32_partitioned_groups_flat[number]
    state = optimizer.optimizer.state.get(flat, {})
    keys = {id(value): key for key, value in state.items() if isinstance(value, Tensor)}
    own, *others = files.tensors
    weights = _mapped(own.swap_path, files.numel(), files.dtype())
    named = {keys[id(one.compute_tensor)]: one for one in others if id(one.compute_tensor) in keys}
    maps = {key: _mapped(one.swap_path, files.numel(), files.dtype()) for key, one in named.items()}
    return SwappedFlat(weights, maps, files, optimizer, flat)


def _mapped(path: str, elements: int, dtype: torch.dtype) -> Tensor:
    """The elements of a file, as a tensor that shares its content."""
    try:
        length = os.path.getsize(path)
    except OSError as error:
        raise CheckpointError(f"What DeepSpeed has put on NVMe, {path!r}, cannot be reached: {error}") from error
    if length < elements * dtype.itemsize:
        raise CheckpointError(
            f"What DeepSpeed has put on NVMe, {path!r}, has {length} bytes and should have "
            f"{elements * dtype.itemsize}: something has changed the file. Nothing was saved or loaded."
        )
    return torch.from_file(path, shared=True, size=elements, dtype=dtype)


def frozen_part(parameter: Any, part: Tensor) -> Tensor:
    """This process's part of a parameter that no optimizer holds: ``part``, unless that is on NVMe."""
    own = getattr(parameter, "ds_tensor", None)
    if own is None or own.status.name != "NOT_AVAILABLE":
        return part
    swapper = parameter.nvme_swapper
    return _mapped(swapper.get_path(parameter, must_exist=True), own.ds_numel, swapper.dtype)
