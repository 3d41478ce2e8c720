"""Strategies: those that need nothing but torch, and the names of those in other distributions."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "DDPStrategy": "fabric_core.strategies.ddp:DDPStrategy",
    "ParallelStrategy": "fabric_core.strategies.parallel:ParallelStrategy",
    "SingleDeviceStrategy": "fabric_core.strategies.single_device:SingleDeviceStrategy",
    "Strategy": "fabric_core.strategies.base:Strategy",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
