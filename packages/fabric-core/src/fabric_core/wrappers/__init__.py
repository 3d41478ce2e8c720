"""What ``setup`` and ``setup_dataloaders`` hand back: thin covers around the user's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:
    from fabric_core.wrappers.dataloader import FabricDataLoader as FabricDataLoader
    from fabric_core.wrappers.module import FabricModule as FabricModule
    from fabric_core.wrappers.optimizer import FabricOptimizer as FabricOptimizer
    from fabric_core.wrappers.unwrap import is_wrapped as is_wrapped

_TABLE = {
    "FabricDataLoader": "fabric_core.wrappers.dataloader:FabricDataLoader",
    "FabricModule": "fabric_core.wrappers.module:FabricModule",
    "FabricOptimizer": "fabric_core.wrappers.optimizer:FabricOptimizer",
    "is_wrapped": "fabric_core.wrappers.unwrap:is_wrapped",
    # The spellings that existing programs import.
    "_FabricDataLoader": "fabric_core.wrappers.dataloader:FabricDataLoader",
    "_FabricModule": "fabric_core.wrappers.module:FabricModule",
    "_FabricOptimizer": "fabric_core.wrappers.optimizer:FabricOptimizer",
    "_unwrap_objects": "fabric_core.wrappers.unwrap:unwrap_objects",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = [name for name in sorted(_TABLE) if not name.startswith("_")]
