"""The processor: always there, one process unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from fabric_core.abc.accelerator import Accelerator
from fabric_core.accelerators.device_ids import parse_count
from fabric_core.errors import InvalidArgumentError


class CPUAccelerator(Accelerator):
    """The processor. ``devices`` counts processes."""

    priority: ClassVar[int] = 0
    process_group_backend: ClassVar[str | None] = "gloo"
    instead_of: ClassVar[Mapping[str, str]] = MappingProxyType({"dp": "ddp", "16-mixed": "bf16-mixed"})

    @staticmethod
    def name() -> str:
        """``"cpu"``."""
        return "cpu"

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def auto_device_count() -> int:
        """One process; torch uses all cores in it."""
        return 1

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """A number of processes, at least 1."""
        return parse_count(devices, "cpu")

    @staticmethod
    def get_parallel_devices(devices: int | str | list[int]) -> list[torch.device]:
        """``cpu`` as often as there are processes."""
        return [torch.device("cpu")] * parse_count(devices, "cpu")

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set; ``ValueError`` for a device that is no CPU."""
        if device.type != "cpu":
            raise InvalidArgumentError(f"CPUAccelerator was given the device {device}; it serves cpu only.")
