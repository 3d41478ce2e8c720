"""What a kind of device must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch


class Accelerator(ABC):
    """A kind of device: how many there are, how to choose among them, what they can do.

    The static methods answer without initialising the device's runtime, because they run before processes are
    forked. An instance serves one process; ``setup_device`` is its first call.

    Attributes:
        fabric_api: the contract level the class was written for.
        aliases: further names a user may type; several classes may claim one, the highest ``priority`` that is
            available wins.
        priority: order under ``accelerator="auto"``, highest first. CPU is 0; real devices use 10 and more.
        process_group_backend: ``torch.distributed`` backend for these devices; ``None`` asks torch's own map.
        max_devices: the most devices one job can use, ``None`` for no limit.
        instead_of: strategies and precisions, by name, that make no sense on these devices, and what is taken instead
            with a warning, as ``{"dp": "ddp"}``.
        interactive_devices: how many ``devices="auto"`` takes in a notebook; ``None`` for all.
    """

    fabric_api: ClassVar[str] = "1"
    aliases: ClassVar[frozenset[str]] = frozenset()
    priority: ClassVar[int] = 10
    process_group_backend: ClassVar[str | None] = None
    max_devices: ClassVar[int | None] = None
    interactive_devices: ClassVar[int | None] = None
    instead_of: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @staticmethod
    @abstractmethod
    def name() -> str:
        """The registered name, also the ``torch.device`` type unless ``device_type`` says otherwise."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Whether at least one device can be used now. Must not initialise the runtime."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """How many devices ``devices="auto"`` stands for."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: int | str | list[int]) -> Any:
        """Turn the ``devices`` argument into what ``get_parallel_devices`` takes; refuse what cannot be meant."""

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One ``torch.device`` for each process of this node, in order of local rank."""

    @abstractmethod
    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` this process's current device. ``ValueError`` for a device of another kind."""

    def teardown(self) -> None:
        """Release what ``setup_device`` took."""

    @classmethod
    def device_type(cls) -> str:
        """The ``torch.device`` type, as autocast and the gradient scaler want it."""
        return cls.name()

    @classmethod
    def unavailable_reason(cls) -> str:
        """Why ``is_available`` is False, in words for the user."""
        return f"torch {torch.__version__} sees no {cls.name()} device"

    @classmethod
    def check_fork_safe(cls) -> None:
        """Raise ``RuntimeError`` if this process can no longer be forked safely, as after initialising CUDA."""

    def empty_cache(self) -> None:
        """Give cached device memory back before a large allocation, such as loading a checkpoint."""

    def capture_rng(self) -> dict[str, Any]:
        """Random states of the devices, as tensors and plain values; ``restore_rng`` takes them back."""
        return {}

    def restore_rng(self, state: dict[str, Any]) -> None:
        """Restore what ``capture_rng`` returned."""

    @classmethod
    def peak_flops(cls, device: torch.device, dtype: torch.dtype) -> float | None:
        """Dense FLOP/s that the vendor states for the device, ``None`` if not known."""
        return None
