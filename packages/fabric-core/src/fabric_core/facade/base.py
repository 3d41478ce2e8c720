"""What every part of the facade works with: the plan, the strategy, and who this process is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.abc.overrides import overrides
from fabric_core.errors import CheckpointError, UsageError
from fabric_core.registry import Registry
from fabric_core.resolve.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.logger import Logger
    from fabric_core.abc.precision import Precision


class FabricBase:
    """The state of a ``Fabric`` and its read-only view."""

    _registry: Registry
    _plan: Plan
    _strategy: Any  # a plugin's class: it may have more than the contract
    _precision: Precision
    _direct_backward: bool
    _callbacks: list[Any]
    _loggers: list[Logger]
    _launched: bool = False
    _environment_ready: bool = False
    _rank_zero_group: Any = None

    @property
    def plan(self) -> Plan:
        """Every decision with its origin and reason; ``print(fabric.plan.explain())``."""
        return self._plan

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self._strategy.accelerator  # type: ignore[no-any-return]

    @property
    def strategy(self) -> Any:
        """How the model is spread."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._strategy.root_device  # type: ignore[no-any-return]

    @property
    def global_rank(self) -> int:
        """Rank of this process among all."""
        return self._strategy.global_rank  # type: ignore[no-any-return]

    @property
    def local_rank(self) -> int:
        """Rank of this process on its node."""
        return self._strategy.local_rank  # type: ignore[no-any-return]

    @property
    def node_rank(self) -> int:
        """Rank of this node."""
        return self._strategy.node_rank  # type: ignore[no-any-return]

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return self._strategy.world_size  # type: ignore[no-any-return]

    @property
    def is_global_zero(self) -> bool:
        """Whether this process has rank 0 among all."""
        return self._strategy.is_global_zero  # type: ignore[no-any-return]

    @property
    def is_launched(self) -> bool:
        """Whether this process has joined the others, or needs none."""
        return self._launched or not self._strategy.requires_launch

    def _require_launch(self, method: str) -> None:
        if self._launched:
            return
        if self._strategy.requires_launch:
            raise UsageError(
                f"fabric.{method}() needs the other processes of strategy={self._plan.strategy.name!r}. Call "
                "fabric.launch() first, right after Fabric(...)."
            )
        self._prepare_environment()

    def _prepare_environment(self) -> None:
        if not self._environment_ready:
            self._strategy.setup_environment()
            self._environment_ready = True

    def _together(self, call: str, action: Callable[[], Any]) -> Any:
        """Run ``action`` on every rank; if it fails on one, no rank goes on as if it had worked."""
        if self.world_size == 1:
            return action()
        try:
            result = action()
        except Exception:  # an interrupt must not wait for the other ranks
            self._strategy.reduce_boolean_decision(False)
            raise
        if not self._strategy.reduce_boolean_decision(True):
            raise CheckpointError(f"{call} failed on another rank; its error says why.")
        return result

    def _finish_saves(self, call: str) -> None:
        """Return once no rank writes a checkpoint in the background any more; if that failed, raise on every rank."""
        io = getattr(self._strategy, "checkpoint_io", None)
        if io is not None and overrides(io, CheckpointIO, "drain"):
            self._together(f"A save in the background, for which {call} waited,", io.drain)

    def _notify(self, hook: str, **kwargs: Any) -> None:
        if self._registry.has_hook(hook):
            getattr(self._registry.hooks, hook)(fabric=self, **kwargs)
