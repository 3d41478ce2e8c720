"""The dtypes of a model that DeepSpeed trains."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from fabric_core.errors import InvalidArgumentError
from fabric_core.precision import Precision
from fabric_core.precision.casting import DefaultDtype, cast_floats

Name: TypeAlias = Literal["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}


class DeepSpeedPrecision(Precision):
    """How DeepSpeed understands the five names.

    With 16 bits the parameters are in 16 bits, and so are inputs, compute and gradients; DeepSpeed updates a copy of
    the parameters in float32 that is split over processes. Outputs come back in torch's default dtype, so losses are
    computed in float32. ``"16-..."`` scales losses, as the strategy's ``loss_scale`` says, and skips steps that
    overflow.

    ``"-true"`` and ``"-mixed"`` differ in how the model is made: with ``"-true"`` it has 16 bits from the start,
    buffers included; with ``"-mixed"`` it is made in float32, and set-up turns its parameters to 16 bits. There is no
    autocast in either.

    Args:
        precision: one of the five names.
    """

    def __init__(self, precision: Name = "32-true") -> None:
        if precision not in DTYPES:
            names = ", ".join(map(repr, DTYPES))
            raise InvalidArgumentError(
                f"DeepSpeedPrecision({precision!r}): DeepSpeed knows {names}. Pass one of these as precision=, or "
                "choose another strategy."
            )
        self.precision = precision
        self.compute_dtype = DTYPES[precision]
        self._half = self.compute_dtype is not torch.float32
        self._half_from_the_start = self._half and precision.endswith("-true")

    @classmethod
    def float16(cls) -> DeepSpeedPrecision:
        """``"16-true"``."""
        return cls("16-true")

    @classmethod
    def bfloat16(cls) -> DeepSpeedPrecision:
        """``"bf16-true"``."""
        return cls("bf16-true")

    @classmethod
    def mixed_float16(cls) -> DeepSpeedPrecision:
        """``"16-mixed"``."""
        return cls("16-mixed")

    @classmethod
    def mixed_bfloat16(cls) -> DeepSpeedPrecision:
        """``"bf16-mixed"``."""
        return cls("bf16-mixed")

    @property
    def changes_forward(self) -> bool:
        """Not in single precision, where the module itself is called."""
        return self._half

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Parameters and buffers to 16 bits for ``"-true"``; DeepSpeed does the rest."""
        if not self._half_from_the_start:
            return module
        return module.half() if self.compute_dtype is torch.float16 else module.bfloat16()

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New floating-point tensors have 16 bits for ``"-true"``."""
        return DefaultDtype(self.compute_dtype) if self._half_from_the_start else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New parameters have 16 bits for ``"-true"``."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors that forward creates have the dtype of the parameters."""
        return DefaultDtype(self.compute_dtype) if self._half else nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to the dtype of the parameters."""
        return cast_floats(data, self.compute_dtype) if self._half else data

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype()) if self._half else data
