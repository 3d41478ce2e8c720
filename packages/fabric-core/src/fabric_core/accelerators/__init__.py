"""Accelerators: those that need nothing but torch, and the names of those in other distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:  # for type checkers and editors, which cannot read the table
    from fabric_core.abc.accelerator import Accelerator as Accelerator
    from fabric_core.accelerators.cpu import CPUAccelerator as CPUAccelerator
    from fabric_core.accelerators.generic import GenericAccelerator as GenericAccelerator
    from fabric_core.accelerators.mps import MPSAccelerator as MPSAccelerator

_TABLE = {
    "Accelerator": "fabric_core.abc.accelerator:Accelerator",
    "CPUAccelerator": "fabric_core.accelerators.cpu:CPUAccelerator",
    "GenericAccelerator": "fabric_core.accelerators.generic:GenericAccelerator",
    "MPSAccelerator": "fabric_core.accelerators.mps:MPSAccelerator",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
