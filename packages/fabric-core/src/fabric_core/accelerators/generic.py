"""Any device that this build of torch knows through ``torch.accelerator``, with no vendor's code."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fabric_core.abc.accelerator import Accelerator
from fabric_core.accelerator_of_torch import accelerator_of_torch
from fabric_core.accelerators.device_ids import parse_device_ids
from fabric_core.errors import InvalidArgumentError, UsageError


def _indices() -> list[int]:
    return list(range(torch.accelerator.device_count())) if accelerator_of_torch() is not None else []


class GenericAccelerator(Accelerator):
    """Serves whatever ``torch.accelerator`` reports: a plugin for that device is better, this one is there today.

    Everything goes through torch's own device-neutral calls, so it knows no peak FLOP/s.
    """

    aliases: ClassVar[frozenset[str]] = frozenset({"gpu"})
    priority: ClassVar[int] = 5

    @staticmethod
    def name() -> str:
        """``"generic"``; ``device_type`` says which device that is here."""
        return "generic"

    @classmethod
    def device_type(cls) -> str:
        """The type of device that torch reports; ``RuntimeError`` if it reports none."""
        found = accelerator_of_torch()
        if found is None:
            raise UsageError(f"accelerator='generic' finds no device: {cls.unavailable_reason()}.")
        return found.type

    @staticmethod
    def is_available() -> bool:
        """Whether torch reports an accelerator that can be used now."""
        return accelerator_of_torch() is not None

    @classmethod
    def unavailable_reason(cls) -> str:
        """Why there is none."""
        return f"torch.accelerator of torch {torch.__version__} reports no device"

    @staticmethod
    def auto_device_count() -> int:
        """All of them."""
        return len(_indices())

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Indices among those that torch reports."""
        return parse_device_ids(devices, _indices(), "generic")

    @staticmethod
    def get_parallel_devices(devices: int | str | list[int]) -> list[torch.device]:
        """One ``torch.device`` for each index."""
        kind = GenericAccelerator.device_type()
        return [torch.device(kind, index) for index in parse_device_ids(devices, _indices(), "generic")]

    def setup_device(self, device: torch.device) -> None:
        """Make it torch's current device; ``ValueError`` for a device of another type."""
        kind = self.device_type()
        if device.type != kind:
            raise InvalidArgumentError(f"GenericAccelerator was given the device {device}; here it serves {kind} only.")
        torch.accelerator.set_device_index(device.index or 0)

    @classmethod
    def check_fork_safe(cls) -> None:
        """``RuntimeError`` once the device's runtime is initialised in this process, where its torch module tells."""
        initialized = getattr(cls._module(), "is_initialized", None)
        if initialized is not None and initialized():
            raise UsageError(
                f"The {cls.device_type()} runtime is initialised in this process, so that it cannot be forked. Do not "
                "touch the device before fabric.launch(); in a notebook, restart the kernel."
            )

    @classmethod
    def _module(cls) -> Any:
        return torch.get_device_module(cls.device_type())

    def empty_cache(self) -> None:
        """Give cached memory back, where the device's torch module can."""
        empty = getattr(self._module(), "empty_cache", None)
        if empty is not None:
            empty()

    def capture_rng(self) -> dict[str, Any]:
        """The generators of all devices, where the device's torch module offers them."""
        get = getattr(self._module(), "get_rng_state_all", None)
        return {self.device_type(): get()} if get is not None else {}

    def restore_rng(self, state: dict[str, Any]) -> None:
        """Restore the generators of all devices."""
        restore = getattr(self._module(), "set_rng_state_all", None)
        if restore is not None and self.device_type() in state:
            restore(state[self.device_type()])
