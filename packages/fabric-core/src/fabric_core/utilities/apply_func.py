"""Nested data: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "apply_to_collection": "fabric_core.collections:apply_to_collection",
    "convert_tensors_to_scalars": "fabric_core.collections:convert_tensors_to_scalars",
    "convert_to_tensors": "fabric_core.collections:convert_to_tensors",
    "move_data_to_device": "fabric_core.collections:move_data_to_device",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
