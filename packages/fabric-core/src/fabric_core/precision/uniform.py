"""Everything in one dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import nn

from fabric_core.abc.precision import Precision
from fabric_core.precision.casting import DefaultDtype, cast_floats

_CONVERT: Final[dict[torch.dtype, Callable[[nn.Module], nn.Module]]] = {
    torch.float64: nn.Module.double,
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
}
"""Not ``module.to(dtype)``, which takes the imaginary part from complex parameters."""


class UniformPrecision(Precision):
    """Parameters, inputs and compute in one dtype; outputs come back in torch's default dtype.

    Args:
        precision: the name it goes by.
        dtype: float64, float16 or bfloat16.
    """

    def __init__(self, precision: str, dtype: torch.dtype) -> None:
        self.precision = precision
        self.compute_dtype = dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Floating-point parameters and buffers to the dtype, in place."""
        return _CONVERT[self.compute_dtype](module)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New floating-point tensors have the dtype."""
        return DefaultDtype(self.compute_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New parameters have the dtype."""
        return DefaultDtype(self.compute_dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors that forward creates have the dtype."""
        return DefaultDtype(self.compute_dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to the dtype."""
        return cast_floats(data, self.compute_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())
