"""Training with a gradient scaler, which float16 needs: small gradients survive, steps that overflow are skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from fabric_core.abc.precision import Precision
from fabric_core.errors import InvalidTypeError, UnsupportedError


class ScaledPrecision(Precision):
    """A precision whose ``scaler``, if it has one, multiplies the loss and steps the optimizer.

    Args:
        scaler: the scaler; ``None`` for none.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        self.scaler = scaler
        self._unscaled: set[Optimizer] = set()  # since the last step; a second time is an error

    @property
    def changes_backward(self) -> bool:
        """Only the scaler does."""
        return self.scaler is not None

    @property
    def changes_step(self) -> bool:
        """Only the scaler does."""
        return self.scaler is not None

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        """The loss times the scale."""
        return self.scaler.scale(tensor) if self.scaler is not None else tensor

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step unless gradients are not finite, then adapt the scale."""
        if self.scaler is None:
            return super().optimizer_step(optimizer, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise InvalidTypeError(
                f"LBFGS cannot run under {self.precision!r}: it evaluates the loss several times a step, and the "
                "gradient scaler allows one. Use precision='bf16-mixed' or '32-true'."
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
                f"Gradients of {type(optimizer).__name__} cannot be clipped under {self.precision!r}: this optimizer "
                "removes the scale itself inside step(). Build it with fused=False, or use precision='bf16-mixed'."
            )
        if optimizer not in self._unscaled:
            self.scaler.unscale_(optimizer)
            self._unscaled.add(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty without one."""
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scaler's state."""
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state_dict))
