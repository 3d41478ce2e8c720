"""Process-wide settings of numerics and random states, which a fresh interpreter would not have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GlobalState:
    """What a spawned process needs in order to compute like the one that spawned it.

    Attributes:
        deterministic: ``torch.use_deterministic_algorithms``.
        warn_only: its ``warn_only``.
        matmul_precision: ``torch.set_float32_matmul_precision``.
        cudnn: the deterministic and benchmark switches of ``torch.backends.cudnn``.
        random: the states of the random generators.
    """

    deterministic: bool
    warn_only: bool
    matmul_precision: str
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
            torch.get_float32_matmul_precision(),
            (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            collect_rng_states(include_device=False),
        )

    def restore(self) -> None:
        """Give this process the state that was captured in another one."""
        import torch

        from fabric_core.seeding import set_rng_states

        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.cudnn
        set_rng_states(self.random)
