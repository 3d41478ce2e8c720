"""Handing a module over to ``fully_shard``, unit by unit."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from fabric_core.strategies.sharded.fsdp1_arguments import Dtypes, ShardOptions, read_cpu_offload, read_overrides
from fabric_core.strategies.sharded.groups import fsdp_modules
from fabric_core.strategies.sharded.materialize import broadcast_unit, materialize_sharded, materialize_unit
from fabric_core.strategies.sharded.meshes import Sharding
from fabric_core.strategies.sharded.wrapping import Unit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Splitting:
    """How one module is split.

    Attributes:
        root: the whole module.
        units: modules inside that are sharded by themselves, inner before outer.
        mesh: the processes.
        device: where the memory of this process is.
        sharding: when parameters are freed.
        options: further arguments.
        cpu_offload: as the strategy's argument.
        dtypes: of parameters in use and of sums.
        in_full: modules that compute in float32.
        ignored: modules that stay as they are.
        places: module and name of parameters that stay whole.
    """

    root: nn.Module
    units: list[Unit]
    mesh: DeviceMesh
    device: torch.device
    sharding: Sharding
    options: ShardOptions
    cpu_offload: Any
    dtypes: Dtypes
    in_full: set[nn.Module]
    ignored: set[nn.Module]
    places: set[tuple[nn.Module, str]]

    def run(self) -> None:
        """Each unit gets memory and values, and is cut up before the next one is looked at. Every rank calls it."""
        given = fsdp_modules(self.root)
        done = {part for unit in given for part in unit.modules()}  # type: ignore[attr-defined]
        for unit in [*self.units, Unit(self.root)]:
            module = unit.module
            if module in done:
                continue
            materialize_unit(module, done, self.device, self.options.param_init_fn)
            if self.options.sync_module_states:
                broadcast_unit(module, done)
            self._cast_buffers(module, done)
            fully_shard(module, **self._arguments(unit))
            done.update(module.modules())
        if given:
            materialize_sharded(self.root, self.device)

    def _arguments(self, unit: Unit) -> dict[str, Any]:
        """What ``fully_shard`` takes for one unit; what is ``None`` is left to it."""
        reshard = self.options.reshard_after_forward
        usual = self.dtypes.root if unit.module is self.root else self.dtypes.unit
        arguments: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": self.sharding.reshard_after_forward if reshard is None else reshard,
            "shard_placement_fn": self.options.shard_placement_fn,
            "mp_policy": self.dtypes.full if unit.module in self.in_full else usual,
            "offload_policy": read_cpu_offload(self.cpu_offload, self.device.type),
            "ignored_params": self._ignored_parameters(),
            **read_overrides(unit.overrides, self.sharding, self.device.type),
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def _ignored_parameters(self) -> set[nn.Parameter] | None:
        if not self.places:
            return None
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UnsupportedError(
                f"torch {torch.__version__} cannot leave parameters out of sharding (ignored_modules, ignored_states, "
                "ignored_params). Install torch 2.7 or newer."
            )
        return {module._parameters[name] for module, name in self.places}  # type: ignore[misc]

    def _cast_buffers(self, unit: nn.Module, done: set[nn.Module]) -> None:
        """Give floating-point buffers of the unit their dtype, but for modules that compute in full."""
        if self.dtypes.buffers is None:
            return
        for part in set(unit.modules()) - done - self.ignored - self.in_full:
            for buffer in part.buffers(recurse=False):
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(self.dtypes.buffers)


def check_parts(root: nn.Module, places: set[tuple[nn.Module, str]]) -> None:
    """Refuse what ``fully_shard`` cannot hold.

    Args:
        root: the whole module.
        places: module and name of parameters that stay whole.

    Raises:
        TypeError: a part is wrapped in ``FullyShardedDataParallel``, or split over other axes already.
        ValueError: a parameter has no dimensions.
    """
    sharded = {part for unit in fsdp_modules(root) for part in unit.modules()}  # type: ignore[attr-defined]
    scalars = []
    for path, module in root.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise InvalidTypeError(
                f"{path or 'The module'} is wrapped in FullyShardedDataParallel. FSDPStrategy shards with its "
                "successor, fully_shard, which cannot hold it: pass the bare module, and let auto_wrap_policy choose "
                "the units, or apply torch.distributed.fsdp.fully_shard to them."
            )
        for name, parameter in module.named_parameters(path, recurse=False):
            if isinstance(parameter, DTensor) and module not in sharded:
                raise InvalidTypeError(
                    f"{name} is a DTensor, as after tensor parallelism. FSDPStrategy splits over data-parallel "
                    "processes only: use ModelParallelStrategy for both."
                )
            if parameter.ndim == 0 and (module, name.rpartition(".")[2]) not in places:
                scalars.append(name)
    if scalars:
        raise InvalidArgumentError(
            f"Parameters without dimensions cannot be cut: {', '.join(scalars)}. Give them the shape (1,), or leave "
            "them whole with FSDPStrategy(ignored_params=...)."
        )
