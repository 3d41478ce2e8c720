"""The plan: every decision that ``Fabric(...)`` made, before any device is touched."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fabric_core.errors import UsageError
from fabric_core.resolve.choice import Choice
from fabric_core.resolve.objects import given_in

if TYPE_CHECKING:
    import torch

    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.precision import Precision
    from fabric_core.abc.strategy import Strategy
    from fabric_core.registry import Registry


@dataclass(frozen=True)
class Plan:
    """What will run: one ``Choice`` for each question, with its origin and reason.

    Attributes:
        environment: who starts the processes.
        accelerator: the kind of device.
        devices: the devices of this node.
        num_nodes: how many nodes.
        strategy: how the model is spread.
        precision: the dtypes.
        checkpoint_io: where checkpoints go; ``None`` leaves it to the strategy.
        interactive: whether this is a notebook or a prompt.
    """

    environment: Choice[ClusterEnvironment]
    accelerator: Choice[Accelerator]
    devices: Choice[list[torch.device]]
    num_nodes: Choice[int]
    strategy: Choice[Strategy]
    precision: Choice[Precision]
    checkpoint_io: Choice[CheckpointIO] | None
    interactive: bool

    def choices(self) -> dict[str, Choice[Any]]:
        """The decisions by name, in the order they were made."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Choice)}

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The decisions as plain values, for JSON."""
        return {name: choice.row() for name, choice in self.choices().items()}

    def explain(self) -> str:
        """A table of every value with its origin, its plugin and the reason for it."""
        rows = [("", "value", "origin", "plugin", "reason")]
        rows += [(name, c.name, c.origin, c.plugin or "-", c.reason) for name, c in self.choices().items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )

    def fingerprint(self, registry: Registry) -> tuple[str, ...]:
        """What must be the same on every rank: the names, and the plugins and versions that stand behind them here."""
        shared = [(name, c) for name, c in self.choices().items() if name not in ("devices", "environment")]
        names = (f"{name}={c.name}" for name, c in shared)
        return (*names, *registry.fingerprint(c.ref for _, c in shared if c.ref is not None))

    def build(self) -> Strategy:
        """Connect the parts and return the strategy, ready to launch."""
        strategy = self.strategy.value
        given = given_in(strategy)
        if self.checkpoint_io is None and "checkpoint_io" in strategy.resolved:
            strategy.checkpoint_io = None  # type: ignore[assignment]  # what an earlier Fabric(...) put there
        chosen = {name: choice.value for name, choice in self.choices().items()}
        strategy.resolved = {name: value for name, value in chosen.items() if name not in given}
        strategy.accelerator = self.accelerator.value
        strategy.precision = self.precision.value
        if self.checkpoint_io is not None:
            strategy.checkpoint_io = self.checkpoint_io.value
        strategy.connect(
            devices=self.devices.value,
            num_nodes=self.num_nodes.value,
            environment=self.environment.value,
            interactive=self.interactive,
        )
        launcher = strategy.launcher
        if self.interactive and launcher is not None and not launcher.is_interactive_compatible:
            raise UsageError(
                f"strategy={self.strategy.name!r} ({self.strategy.origin}) starts processes in a way that does not "
                'work in notebooks and at the prompt. Use strategy="ddp_notebook", or devices=1.'
            )
        return strategy
