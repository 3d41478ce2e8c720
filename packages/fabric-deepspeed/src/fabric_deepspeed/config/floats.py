"""The sections for float16 and bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fabric_deepspeed.config.keywords import Path
from fabric_deepspeed.config.section import Section, check, switch, whole

_DYNAMIC = ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")


def _scale(value: Any) -> float:
    if isinstance(value, (bool, str)) or not math.isfinite(value) or value < 0:
        raise ValueError(value)
    return value  # type: ignore[no-any-return]  # as typed: 0 and 128 stay whole


@dataclass(frozen=True)
class Float16Config(Section):
    """The section ``fp16``. A fixed ``loss_scale`` leaves out what only a changing one needs.

    Attributes:
        enabled: whether the model computes in float16.
        loss_scale: what the loss is multiplied by; 0 lets it change with overflows.
        initial_scale_power: it starts at two to this power.
        loss_scale_window: steps without overflow after which it doubles.
        hysteresis: overflows that are let pass before it halves.
        min_loss_scale: it never falls below.
    """

    path: ClassVar[Path] = ("fp16",)

    enabled: bool = switch(True)
    loss_scale: float = field(
        default=0, metadata=check("a finite number of at least 0; 0 lets it change with overflows", _scale)
    )
    initial_scale_power: int = whole(16)
    loss_scale_window: int = whole(1000, least=1)
    hysteresis: int = whole(2, least=1)
    min_loss_scale: int = whole(1, least=1)

    def section(self) -> dict[str, Any]:
        """The section as DeepSpeed takes it."""
        section = super().section()
        return {name: value for name, value in section.items() if self.loss_scale == 0 or name not in _DYNAMIC}


@dataclass(frozen=True)
class BFloat16Config(Section):
    """The section ``bf16``.

    Attributes:
        enabled: whether the model computes in bfloat16.
    """

    path: ClassVar[Path] = ("bf16",)

    enabled: bool = switch(True)
