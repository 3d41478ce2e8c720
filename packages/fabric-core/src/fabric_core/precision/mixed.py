"""Parameters in float32, most of the compute in 16 bits, through ``torch.autocast``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.amp import GradScaler

from fabric_core.errors import InvalidArgumentError
from fabric_core.precision.casting import cast_floats
from fabric_core.precision.scaled import ScaledPrecision

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision(ScaledPrecision):
    """``"16-mixed"`` and ``"bf16-mixed"``: float32 parameters under autocast; float16 adds a gradient scaler.

    The scaler multiplies the loss so that small gradients survive float16, and skips a step whose gradients are not
    finite. Its state belongs into a checkpoint: see ``state_dict``.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: type of device whose operations are cast.
        scaler: the scaler to use instead of a default one; float16 only.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str = "cpu",
        scaler: GradScaler | None = None,
    ) -> None:
        if precision not in _DTYPES:
            raise InvalidArgumentError(f"MixedPrecision({precision!r}): expected one of {sorted(_DTYPES)}.")
        if precision == "bf16-mixed" and scaler is not None:
            raise InvalidArgumentError(
                "MixedPrecision('bf16-mixed') takes no scaler: bfloat16 has float32's range. "
                "Leave scaler out, or use '16-mixed'."
            )
        super().__init__(scaler or (GradScaler(device=device) if precision == "16-mixed" else None))
        self.precision = precision
        self.device = device
        self.compute_dtype = _DTYPES[precision]

    @classmethod
    def float16(cls, device: str = "cpu") -> MixedPrecision:
        """``"16-mixed"`` with a default scaler."""
        return cls("16-mixed", device)

    @classmethod
    def bfloat16(cls, device: str = "cpu") -> MixedPrecision:
        """``"bf16-mixed"``."""
        return cls("bf16-mixed", device)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for the device."""
        return torch.autocast(self.device, dtype=self.compute_dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype; autocast takes it from there."""
        return cast_floats(data, torch.get_default_dtype())

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())
