"""Types of the public surface: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "CollectibleGroup": "fabric_core.types:CollectibleGroup",
    "Optimizable": "fabric_core.types:Optimizable",
    "ReduceOp": "torch.distributed:ReduceOp",
    "Steppable": "fabric_core.types:Steppable",
    "_DEVICE": "fabric_core.types:Device",
    "_MAP_LOCATION_TYPE": "fabric_core.types:MapLocation",
    "_PARAMETERS": "fabric_core.types:Parameters",
    "_PATH": "fabric_core.types:Path",
    "_Stateful": "fabric_core.types:Stateful",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
