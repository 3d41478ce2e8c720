"""The insides of ``fully_shard`` that have no public name, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """The parts of ``module``, itself included, that ``fully_shard`` was applied to; outer ones first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def class_name(module: nn.Module) -> str:
    """The name of the class that the user wrote; ``fully_shard`` puts one of its own in front."""
    kind = type(module)
    return kind.__bases__[1].__name__ if isinstance(module, FSDPModule) and len(kind.__bases__) > 1 else kind.__name__


def parameter_groups(module: FSDPModule) -> list[Any]:
    """What holds the parameters, the switches and the buffers of one unit; empty if the unit owns no parameter."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # a list since torch 2.12, one before
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


GRADIENT_SWITCHES: Final = ("reduce_grads", "all_reduce_grads")
"""Attributes of a parameter group: reduce within the group that shards, and between the replicas of hybrid sharding."""


def sharded_parameters(group: Any) -> list[nn.Parameter]:
    """The group's parameters, in parts."""
    return [parameter.sharded_param for parameter in group.fsdp_params]


def take_over_memory(group: Any) -> None:
    """Have the group notice that its parameters were given other memory, as after ``load_state_dict(assign=True)``."""
    for parameter in group.fsdp_params:
        parameter.reset_sharded_param()


def mesh_of(group: Any) -> DeviceMesh:
    """The mesh that the group shards or replicates over."""
    mesh: DeviceMesh = group.mesh_info.mesh
    return mesh


def offloads(group: Any) -> bool:
    """Whether the group keeps its parts in the memory of the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(group.offload_policy, CPUOffloadPolicy)


@contextmanager
def kept_whole(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, which is inside a forward of ``module``, its own parameters stay whole.

    Otherwise a second forward inside the first would split them before the first is through.
    """
    groups = parameter_groups(module) if isinstance(module, FSDPModule) else []
    before = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, mesh_info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh_info
