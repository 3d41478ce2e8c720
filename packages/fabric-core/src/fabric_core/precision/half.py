"""Parameters and compute in 16 bits, with no copy in 32."""

from __future__ import annotations

from typing import Literal

import torch

from fabric_core.errors import InvalidArgumentError
from fabric_core.precision.uniform import UniformPrecision

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(UniformPrecision):
    """``"16-true"`` and ``"bf16-true"``: 16-bit parameters and compute; outputs come back in torch's default dtype."""

    def __init__(self, precision: Literal["16-true", "bf16-true"] = "16-true") -> None:
        if precision not in _DTYPES:
            raise InvalidArgumentError(f"HalfPrecision({precision!r}): expected one of {sorted(_DTYPES)}.")
        super().__init__(precision, _DTYPES[precision])

    @classmethod
    def float16(cls) -> HalfPrecision:
        """``"16-true"``."""
        return cls("16-true")

    @classmethod
    def bfloat16(cls) -> HalfPrecision:
        """``"bf16-true"``."""
        return cls("bf16-true")
