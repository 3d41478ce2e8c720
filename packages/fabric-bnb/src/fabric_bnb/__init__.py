"""Quantised layers of bitsandbytes for Fabric. Names are loaded when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:  # for type checkers and editors, which cannot read the table
    from fabric_bnb.linear4bit import QuantizedLinear4bit as QuantizedLinear4bit
    from fabric_bnb.linear8bit import QuantizedLinear8bit as QuantizedLinear8bit
    from fabric_bnb.linear8bit import TrainableLinear8bit as TrainableLinear8bit
    from fabric_bnb.precision import BitsandbytesPrecision as BitsandbytesPrecision

_TABLE = {
    "BitsandbytesPrecision": "fabric_bnb.precision:BitsandbytesPrecision",
    "QuantizedLinear4bit": "fabric_bnb.linear4bit:QuantizedLinear4bit",
    "QuantizedLinear8bit": "fabric_bnb.linear8bit:QuantizedLinear8bit",
    "TrainableLinear8bit": "fabric_bnb.linear8bit:TrainableLinear8bit",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
