"""Parameters and compute in 16 bits, with no copy in 32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from fabric_core.abc.precision import Precision
from fabric_core.errors import InvalidArgumentError
from fabric_core.precision.casting import DefaultDtype, cast_floats

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(Precision):
    """``"16-true"`` and ``"bf16-true"``: 16-bit parameters and compute; outputs come back in torch's default dtype."""

    def __init__(self, precision: Literal["16-true", "bf16-true"] = "16-true") -> None:
        if precision not in _DTYPES:
            raise InvalidArgumentError(f"HalfPrecision({precision!r}): expected one of {sorted(_DTYPES)}.")
        self.precision = precision
        self.compute_dtype = _DTYPES[precision]

    @classmethod
    def float16(cls) -> HalfPrecision:
        """``"16-true"``."""
        return cls("16-true")

    @classmethod
    def bfloat16(cls) -> HalfPrecision:
        """``"bf16-true"``."""
        return cls("bf16-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Floating-point parameters and buffers to 16 bits, in place."""
        return module.to(dtype=self.compute_dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New floating-point tensors have 16 bits."""
        return DefaultDtype(self.compute_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New parameters have 16 bits."""
        return DefaultDtype(self.compute_dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors that forward creates have 16 bits."""
        return DefaultDtype(self.compute_dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to 16 bits."""
        return cast_floats(data, self.compute_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())
