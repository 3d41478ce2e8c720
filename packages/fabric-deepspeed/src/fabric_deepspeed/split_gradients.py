"""Stage 3's own gradients: a parameter that got none in a step must not get those of an earlier step again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fabric_deepspeed.nvme import zero_swapped_gradient


def clear_parts(optimizer: Any) -> None:
    """Zero this process's part of all gradients, after a step. DeepSpeed only overwrites those that come."""
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def clear_offloaded(optimizer: Any) -> None:
    """Zero the offloaded gradients of parameters that got none since the last step, before the next one."""
    came = getattr(optimizer, "_offload_boundary_param_ids", None)
    if came is None:
        return
    for parameter in _held(optimizer):
        if parameter.ds_id not in came:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            if optimizer._swappable_optimizer_subgroup(group):
                zero_swapped_gradient(optimizer, group, offset, size)
            else:
                optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, size).zero_()


def forget_arrivals(optimizer: Any) -> None:
    """Forget which parameters got gradients since the last step."""
    if hasattr(optimizer, "_offload_boundary_param_ids"):
        optimizer._offload_boundary_param_ids = set()


def _held(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.fp16_groups:
        yield from (parameter for parameter in group if parameter.requires_grad)
