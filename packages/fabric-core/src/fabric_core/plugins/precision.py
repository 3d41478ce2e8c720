"""Precisions: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "DoublePrecision": "fabric_core.precision.double:DoublePrecision",
    "FSDPPrecision": "fabric_core.precision.sharded:FSDPPrecision",
    "HalfPrecision": "fabric_core.precision.half:HalfPrecision",
    "MixedPrecision": "fabric_core.precision.mixed:MixedPrecision",
    "Precision": "fabric_core.abc.precision:Precision",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
