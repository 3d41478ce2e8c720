"""Accelerators: those that need nothing but torch, and the names of those in other distributions."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "Accelerator": "fabric_core.abc.accelerator:Accelerator",
    "CPUAccelerator": "fabric_core.accelerators.cpu:CPUAccelerator",
    "GenericAccelerator": "fabric_core.accelerators.generic:GenericAccelerator",
    "MPSAccelerator": "fabric_core.accelerators.mps:MPSAccelerator",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
