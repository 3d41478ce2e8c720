"""What ``setup`` and ``setup_dataloaders`` hand back: thin covers around the user's own objects."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.wrappers.dataloader import FabricDataLoader as FabricDataLoader
    from fabric_core.wrappers.module import FabricModule as FabricModule
    from fabric_core.wrappers.optimizer import FabricOptimizer as FabricOptimizer
    from fabric_core.wrappers.unwrap import is_wrapped as is_wrapped

_HOME = {
    "FabricDataLoader": ("dataloader", "FabricDataLoader"),
    "FabricModule": ("module", "FabricModule"),
    "FabricOptimizer": ("optimizer", "FabricOptimizer"),
    "is_wrapped": ("unwrap", "is_wrapped"),
    # The spellings that existing programs import.
    "_FabricDataLoader": ("dataloader", "FabricDataLoader"),
    "_FabricModule": ("module", "FabricModule"),
    "_FabricOptimizer": ("optimizer", "FabricOptimizer"),
    "_unwrap_objects": ("unwrap", "unwrap_objects"),
}
__all__ = ["FabricDataLoader", "FabricModule", "FabricOptimizer", "is_wrapped"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, attribute = _HOME[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
