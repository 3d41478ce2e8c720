"""Corrections to what DeepSpeed does with NVMe, on the objects of one engine: each for a mistake of release 0.19.8."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fabric_deepspeed.backend import kept_elsewhere


def correct_nvme(engine: Any) -> None:
    """Have an engine read from NVMe what it should; nothing happens where nothing is offloaded to it.

    ``RuntimeError`` if this release of DeepSpeed keeps its parts elsewhere than those that are known.
    """
    try:
        if getattr(engine.optimizer, "swap_optimizer", False):
            _align_gradients(engine.optimizer.optimizer_swapper)
        found = (getattr(parameter, "nvme_swapper", None) for parameter in engine.module.parameters())
        for swapper in {id(swapper): swapper for swapper in found if swapper is not None}.values():
            _read_once(swapper)
    except AttributeError as error:
        raise kept_elsewhere("what it does with NVMe") from error


def _align_gradients(swapper: Any) -> None:
    """Cut gradients where the disk's blocks begin.

    DeepSpeed reads each into a buffer, at its own place there; if that is not the beginning of a block, nothing is
    read, and the step takes what was in the buffer. The piece before stays in memory, as the one after the last block.
    """
    inside, reference = type(swapper)._adjust_for_misaligned_lengths, weakref.ref(swapper)
    width = swapper.numel_alignment

    def adjust(tensors: Sequence[Tensor], offsets: Sequence[int]) -> Any:
        own = reference()
        assert own is not None
        pieces, places = list[Tensor](), list[int]()
        for tensor, offset in zip(tensors, offsets, strict=True):
            lead = -offset % width if own.is_swappable_tensor(tensor=tensor) else 0
            pieces += [tensor[:lead], tensor[lead:]] if lead else [tensor]
            places += [offset, offset + lead] if lead else [offset]
        return inside(own, tensors=pieces, offsets=places)

    swapper._adjust_for_misaligned_lengths = adjust


def _read_once(swapper: Any) -> None:
    """A parameter that is needed twice soon, in forward and in backward, is read ahead once; DeepSpeed fails there."""
    inside, reference = type(swapper).swap_in, weakref.ref(swapper)

    def swap_in(params: Sequence[Any], async_op: bool = True, swap_in_buffers: Any = None) -> None:
        if swap_in_buffers is None:
            params = list({parameter.ds_id: parameter for parameter in params}.values())
        inside(reference(), params, async_op, swap_in_buffers)

    swapper.swap_in = swap_in


def zero_swapped_gradient(optimizer: Any, group: int, offset: int, size: int) -> None:
    """The gradient of a parameter that got none in this step: zeros, not what an earlier step has left in its files."""
    flat = optimizer.fp32_partitioned_groups_flat[group]
    gradients = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]
    for start in [start for start in gradients.swapped_gradients if offset <= start < offset + size]:
        del gradients.swapped_gradients[start]
    gradients.unswapped_gradients[offset] = torch.zeros(size, dtype=gradients.dtype())
