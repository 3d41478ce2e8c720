"""Keeping optimizer states or parameters in host memory or on NVMe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.keywords import Path
from fabric_deepspeed.config.section import Section, check, switch, whole

Own = TypeVar("Own", bound="Offload")


def _device(value: Any) -> str:
    if value not in ("cpu", "nvme"):
        raise ValueError(value)
    return str(value)


def _folder(value: Any) -> str:
    folder = os.fspath(value)
    if not folder or not isinstance(folder, str):
        raise ValueError(value)
    return folder


@dataclass(frozen=True)
class Offload(Section):
    """What both kinds of offloading share.

    Attributes:
        device: ``"cpu"`` for host memory, ``"nvme"`` for a disk.
        nvme_path: a folder on that disk; used with ``"nvme"`` only.
        pin_memory: page-locked memory, which is faster to copy and cannot be swapped out.
    """

    required: ClassVar[tuple[str, ...]] = ("device",)

    device: str = field(
        default="cpu", metadata=check('"cpu" or "nvme"; without offloading, leave the section out', _device)
    )
    nvme_path: str | None = field(default="/local_nvme", metadata=check("the path of a folder", _folder))
    pin_memory: bool = switch(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "nvme" and self.nvme_path is None:
            raise InvalidArgumentError(
                f'{self.place("device")}="nvme" needs a folder on that disk: add nvme_path="/path/on/the/disk".'
            )

    @classmethod
    def of(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """The section with what ``values`` says; the folder has no default here, as in DeepSpeed."""
        return super().of({"nvme_path": None, **values})

    def section(self) -> dict[str, Any]:
        """The section as DeepSpeed takes it, without what only a disk needs if there is none."""
        section = super().section()
        return section if self.device == "nvme" else {name: section[name] for name in ("device", "pin_memory")}


@dataclass(frozen=True)
class OptimizerOffloadConfig(Offload):
    """The section ``offload_optimizer`` of ``zero_optimization``: states in host memory, where the optimizer runs too.

    Attributes:
        device: ``"cpu"``, or at stage 3 ``"nvme"``.
        nvme_path: as in ``Offload``.
        pin_memory: as in ``Offload``.
        buffer_count: buffers for what is on its way; at least as many as the optimizer has states, plus two.
    """

    path: ClassVar[Path] = ("zero_optimization", "offload_optimizer")

    buffer_count: int = whole(4, least=1)


@dataclass(frozen=True)
class ParameterOffloadConfig(Offload):
    """The section ``offload_param`` of ``zero_optimization``: parameters in host memory until they are needed. Stage 3.

    Attributes:
        device: ``"cpu"`` or ``"nvme"``.
        nvme_path: as in ``Offload``.
        pin_memory: as in ``Offload``.
        buffer_count: buffers for what is on its way from the disk.
        buffer_size: elements that fit into one; at least as many as the largest parameter has.
        max_in_cpu: elements that stay in host memory nevertheless.
    """

    path: ClassVar[Path] = ("zero_optimization", "offload_param")

    buffer_count: int = whole(5, least=1)
    buffer_size: int = whole(100_000_000, least=1)
    max_in_cpu: int = whole(1_000_000_000)
