"""Everything in float64."""

from __future__ import annotations

import torch

from fabric_core.precision.uniform import UniformPrecision


class DoublePrecision(UniformPrecision):
    """``"64-true"``: float64 parameters, inputs and compute; outputs come back in torch's default dtype."""

    def __init__(self) -> None:
        super().__init__("64-true", torch.float64)
