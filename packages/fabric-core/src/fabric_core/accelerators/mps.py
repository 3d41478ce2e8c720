"""Apple's GPU, through torch's ``mps`` device."""

from __future__ import annotations

import platform
from typing import Any, ClassVar

import torch

from fabric_core import settings
from fabric_core.abc.accelerator import Accelerator
from fabric_core.accelerators.device_ids import parse_device_ids
from fabric_core.errors import InvalidArgumentError


class MPSAccelerator(Accelerator):
    """The GPU of an Apple-silicon machine: one device, one process."""

    aliases: ClassVar[frozenset[str]] = frozenset({"gpu"})
    priority: ClassVar[int] = 40
    max_devices: ClassVar[int | None] = 1

    @staticmethod
    def name() -> str:
        """``"mps"``."""
        return "mps"

    @staticmethod
    def is_available() -> bool:
        """On arm Macs whose torch has the backend, unless ``DISABLE_MPS=1``."""
        return (
            not settings.DISABLE_MPS.flag()
            and platform.machine() in ("arm", "arm64")
            and torch.backends.mps.is_available()
        )

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Indices among ``[0]``."""
        return parse_device_ids(devices, [0], "mps")

    @staticmethod
    def get_parallel_devices(devices: int | str | list[int]) -> list[torch.device]:
        """``mps:0``."""
        return [torch.device("mps", index) for index in parse_device_ids(devices, [0], "mps")]

    def setup_device(self, device: torch.device) -> None:
        """Nothing to set; ``ValueError`` for a device of another kind."""
        if device.type != "mps":
            raise InvalidArgumentError(f"MPSAccelerator was given the device {device}; it serves mps only.")

    def empty_cache(self) -> None:
        """Give cached memory back to the system."""
        torch.mps.empty_cache()

    def capture_rng(self) -> dict[str, Any]:
        """The state of the GPU's generator."""
        return {"mps": torch.mps.get_rng_state()}

    def restore_rng(self, state: dict[str, Any]) -> None:
        """Restore the state of the GPU's generator."""
        if "mps" in state:
            torch.mps.set_rng_state(state["mps"])
