"""Making all ranks agree: on values, and on the random numbers that are drawn for a while."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_core.distributed.coalesce import reduce_nested
from fabric_core.distributed.group import carrying_device, is_initialized
from fabric_core.distributed.objects import broadcast_object
from fabric_core.errors import UsageError

_BLOCK: Final = 2**18  # words of 8 bytes, so that what is computed on the way stays small
_ODD: Final = 0x1E3779B97F4A7C15  # any large odd number: products wrap around, and none of its bits get lost


def alone() -> bool:
    """Whether there is no other process."""
    return not is_initialized() or dist.get_world_size() == 1


def broadcast_tensors(tensors: list[Tensor], device: torch.device | None = None) -> None:
    """Rank 0's values on every rank, in place; small tensors travel together. Every rank calls it.

    Args:
        tensors: of equal shapes and dtypes on all ranks.
        device: the device of this process, for tensors on the CPU that the process group cannot send from there.
    """
    if not tensors or alone():
        return

    def send(tensor: Tensor) -> Tensor:
        there = tensor if device is None else tensor.to(carrying_device(device))
        dist.broadcast(there, 0)
        return tensor if there is tensor else tensor.copy_(there)

    with torch.no_grad():
        reduce_nested([t.detach() for t in tensors], send)


def make_equal(tensors: list[Tensor], device: torch.device) -> None:
    """Rank 0's values on every rank, in place, of those tensors that differ. Every rank calls it.

    Ranks that were seeded alike hold the same values already: comparing sums costs small messages only.

    Raises:
        RuntimeError: ranks have different tensors; on all of them.
    """
    if alone():
        return
    if not same_everywhere([(tuple(t.shape), t.dtype) for t in tensors], device):
        raise UsageError(
            "The module is not the same on all ranks: its parameters and buffers that have memory differ in number, "
            "shape or dtype. Build it alike on every rank, on the meta device everywhere or nowhere."
        )
    if tensors:
        differ = _differ([_fingerprint(t) for t in tensors], device)
        broadcast_tensors([t for t, different in zip(tensors, differ, strict=True) if different], device)


def same_everywhere(description: Any, device: torch.device) -> bool:
    """Whether ``repr(description)`` is the same on all ranks. Every rank calls it."""
    return alone() or not _differ([torch.tensor(zlib.crc32(repr(description).encode()))], device)[0]


def _differ(numbers: list[Tensor], device: torch.device) -> list[bool]:
    """Which of the numbers, one int64 each, are not the same on all ranks."""
    target = carrying_device(device)
    low = torch.stack([number.to(target) for number in numbers])
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    different: list[bool] = (low != high).tolist()
    return different


def _fingerprint(tensor: Tensor) -> Tensor:
    """One int64 that is the same for equal bits in equal places, and hardly ever for others."""
    flat = tensor.detach().reshape(-1)
    raw = (flat.clone() if flat.storage_offset() else flat).view(torch.uint8)  # int64 must start at a multiple of 8
    words = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, words.numel(), _BLOCK):
        block = words[first : first + _BLOCK]
        # The place goes in before the bits are mixed: the same values in another order are other values.
        mixed = block ^ (torch.arange(first, first + len(block), device=tensor.device) * _ODD)
        for shift in (32, 29):
            mixed = (mixed ^ (mixed >> shift)) * _ODD
        total += mixed.sum()
    return total


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Inside the ``with`` block every rank draws rank 0's random numbers. Every rank enters it.

    Ranks that had the same random state before have the same one afterwards; others get their own back.
    """
    if alone():
        yield
        return
    own = _random_state(device)
    agreed = broadcast_object(own, 0, carrying_device(device))
    differs = any(not torch.equal(a, b) for a, b in zip(own, agreed, strict=True))
    if differs:
        _set_random_state(device, agreed)
    try:
        yield
    finally:
        if differs:
            _set_random_state(device, own)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
