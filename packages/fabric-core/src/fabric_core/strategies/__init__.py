"""Strategies: those that need nothing but torch, and the names of those in other distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:  # for type checkers and editors, which cannot read the table
    from fabric_core.strategies.base import Strategy as Strategy
    from fabric_core.strategies.ddp import DDPStrategy as DDPStrategy
    from fabric_core.strategies.fsdp import FSDPStrategy as FSDPStrategy
    from fabric_core.strategies.model_parallel import ModelParallelStrategy as ModelParallelStrategy
    from fabric_core.strategies.parallel import ParallelStrategy as ParallelStrategy
    from fabric_core.strategies.sharded.activation_checkpointing import SelectiveCheckpoint as SelectiveCheckpoint
    from fabric_core.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy

_TABLE = {
    "DDPStrategy": "fabric_core.strategies.ddp:DDPStrategy",
    "FSDPStrategy": "fabric_core.strategies.fsdp:FSDPStrategy",
    "ModelParallelStrategy": "fabric_core.strategies.model_parallel:ModelParallelStrategy",
    "ParallelStrategy": "fabric_core.strategies.parallel:ParallelStrategy",
    "SelectiveCheckpoint": "fabric_core.strategies.sharded.activation_checkpointing:SelectiveCheckpoint",
    "SingleDeviceStrategy": "fabric_core.strategies.single_device:SingleDeviceStrategy",
    "Strategy": "fabric_core.strategies.base:Strategy",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
