"""Process-wide settings of numerics and random states, which a fresh interpreter would not have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

_FP32_PRECISIONS: Final = tuple(
    f"{part}fp32_precision"
    for part in (
        *("", "cuda.matmul.", "cudnn.", "cudnn.conv.", "cudnn.rnn."),
        *("mkldnn.", "mkldnn.matmul.", "mkldnn.conv.", "mkldnn.rnn."),
    )
)
"""Attributes of ``torch.backends``, the general before the special. They are new in torch 2.9."""


@dataclass(frozen=True)
class GlobalState:
    """What a spawned process needs in order to compute like the one that spawned it.

    Attributes:
        deterministic: ``torch.use_deterministic_algorithms``.
        warn_only: its ``warn_only``.
        default_dtype: ``torch.set_default_dtype``.
        matmul_precision: ``torch.set_float32_matmul_precision``; ``None`` where the program said it in the newer way.
        fp32_precisions: the newer way: each ``fp32_precision`` below ``torch.backends``, by its place there.
        cudnn: the deterministic and benchmark switches of ``torch.backends.cudnn``.
        random: the states of the random generators.
    """

    deterministic: bool
    warn_only: bool
    default_dtype: torch.dtype
    matmul_precision: str | None
    fp32_precisions: dict[str, str]
    cudnn: tuple[bool, bool]
    random: dict[str, Any]

    @classmethod
    def capture(cls) -> GlobalState | None:
        """The state of this process; ``None`` if it has not imported torch."""
        if "torch" not in sys.modules:
            return None
        import torch

        from fabric_core.seeding import collect_rng_states

        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_default_dtype(),
            _matmul_precision(),
            _fp32_precisions(),
            (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            collect_rng_states(include_device=False),
        )

    def restore(self) -> None:
        """Give this process the state that was captured, here or in another one."""
        import torch

        from fabric_core.seeding import set_rng_states

        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_default_dtype(self.default_dtype)
        if self.matmul_precision is not None and self.matmul_precision != _matmul_precision():
            torch.set_float32_matmul_precision(self.matmul_precision)
        for name, value in self.fp32_precisions.items():
            if _fp32_precisions().get(name, value) != value:  # asked anew: the general ones change the special ones
                owner, _, attribute = f"backends.{name}".rpartition(".")
                setattr(attrgetter(owner)(torch), attribute, value)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.cudnn
        set_rng_states(self.random)


def _matmul_precision() -> str | None:
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to answer once one of the newer settings says something else
        return None


def _fp32_precisions() -> dict[str, str]:
    import torch

    found: dict[str, str] = {}
    for name in _FP32_PRECISIONS:
        try:
            found[name] = attrgetter(name)(torch.backends)
        except AttributeError:  # torch before 2.9
            continue
    return found
