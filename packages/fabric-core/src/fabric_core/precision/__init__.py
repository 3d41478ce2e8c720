"""Precisions: those that need nothing but torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:  # for type checkers and editors, which cannot read the table
    from fabric_core.abc.precision import Precision as Precision
    from fabric_core.precision.double import DoublePrecision as DoublePrecision
    from fabric_core.precision.half import HalfPrecision as HalfPrecision
    from fabric_core.precision.mixed import MixedPrecision as MixedPrecision
    from fabric_core.precision.sharded import FSDPPrecision as FSDPPrecision

_TABLE = {
    "DoublePrecision": "fabric_core.precision.double:DoublePrecision",
    "FSDPPrecision": "fabric_core.precision.sharded:FSDPPrecision",
    "HalfPrecision": "fabric_core.precision.half:HalfPrecision",
    "MixedPrecision": "fabric_core.precision.mixed:MixedPrecision",
    "Precision": "fabric_core.abc.precision:Precision",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
