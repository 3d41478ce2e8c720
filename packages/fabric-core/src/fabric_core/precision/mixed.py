"""Parameters in float32, most of the compute in 16 bits, through ``torch.autocast``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from fabric_core.abc.precision import Precision
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from fabric_core.precision.casting import cast_floats

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision(Precision):
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
        self.precision = precision
        self.device = device
        self.compute_dtype = _DTYPES[precision]
        self.scaler = scaler or (GradScaler(device=device) if precision == "16-mixed" else None)
        self._unscaled: set[Optimizer] = set()  # since the last step; a second time is an error

    @classmethod
    def float16(cls, device: str = "cpu") -> MixedPrecision:
        """``"16-mixed"`` with a default scaler."""
        return cls("16-mixed", device)

    @classmethod
    def bfloat16(cls, device: str = "cpu") -> MixedPrecision:
        """``"bf16-mixed"``."""
        return cls("bf16-mixed", device)

    @property
    def changes_backward(self) -> bool:
        """Only the scaler does."""
        return self.scaler is not None

    @property
    def changes_step(self) -> bool:
        """Only the scaler does."""
        return self.scaler is not None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for the device."""
        return torch.autocast(self.device, dtype=self.compute_dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype; autocast takes it from there."""
        return cast_floats(data, torch.get_default_dtype())

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        """The loss times the scale."""
        return self.scaler.scale(tensor) if self.scaler is not None else tensor

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step unless gradients are not finite, then adapt the scale."""
        if self.scaler is None:
            return super().optimizer_step(optimizer, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise InvalidTypeError(
                "LBFGS cannot run under '16-mixed': it evaluates the loss several times a step, and the gradient "
                "scaler allows one. Use precision='bf16-mixed' or '32-true'."
            )
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        self._unscaled.clear()  # as the scaler does, for all optimizers
        return output

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, once per step."""
        if self.scaler is None:
            return
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UnsupportedError(
                f"Gradients of {type(optimizer).__name__} cannot be clipped under '16-mixed': this optimizer removes "
                "the scale itself inside step(). Build it with fused=False, or use precision='bf16-mixed'."
            )
        if optimizer not in self._unscaled:
            self.scaler.unscale_(optimizer)
            self._unscaled.add(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty for bfloat16."""
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scaler's state."""
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state_dict))
