"""Everything in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fabric_core.abc.precision import Precision
from fabric_core.precision.casting import DefaultDtype, cast_floats


class DoublePrecision(Precision):
    """``"64-true"``: float64 parameters, inputs and compute; outputs come back in torch's default dtype."""

    precision = "64-true"
    compute_dtype = torch.float64

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Parameters and buffers to float64, in place."""
        return module.double()

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New floating-point tensors are float64."""
        return DefaultDtype(torch.float64)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New parameters are float64."""
        return DefaultDtype(torch.float64)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors that forward creates are float64."""
        return DefaultDtype(torch.float64)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to float64."""
        return cast_floats(data, torch.float64)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())
