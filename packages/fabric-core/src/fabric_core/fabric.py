"""The facade: what users call in their loop."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fabric_core import settings
from fabric_core.facade.checkpoints import Checkpoints
from fabric_core.facade.communication import Communication
from fabric_core.facade.processes import Processes, call_run
from fabric_core.facade.setting_up import SettingUp
from fabric_core.facade.stepping import Stepping
from fabric_core.registry import get_registry
from fabric_core.resolve.pipeline import resolve
from fabric_core.seeding import seed_everything as _seed_everything

if TYPE_CHECKING:
    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.strategy import Strategy


class Fabric(Processes, SettingUp, Stepping, Communication, Checkpoints):
    """Scales a hand-written loop: choose hardware, strategy and precision by name, keep the loop.

    Every name is looked up in the plugin registry when the object is made; ``fabric.plan.explain()`` shows what was
    chosen and why.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, a plugin's name, or an ``Accelerator``.
        strategy: ``"auto"``, ``"ddp"``, a plugin's name, or a ``Strategy``.
        devices: per node: a count, indices (``[0, 2]``, ``"0,2"``), ``-1`` or ``"auto"``.
        num_nodes: number of machines.
        precision: ``"32-true"``, ``"bf16-mixed"``, a plugin's name, or a short spelling such as ``"bf16"``.
        checkpoint_io: ``"torch"``, ``"async"`` to write in the background, a plugin's name, or a ``CheckpointIO``.
        plugins: a ``Precision``, ``CheckpointIO`` or ``ClusterEnvironment``, or a list of them.
        callbacks: objects whose methods ``fabric.call`` runs; one or a list, which is copied.
        loggers: a ``Logger`` or its registered name; one or a list, which is copied.

    Raises:
        FabricError: the arguments, the environment and the machine do not fit; the message names both sides.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        checkpoint_io: str | CheckpointIO | None = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
    ) -> None:
        self._registry = get_registry()
        arguments = {
            "accelerator": accelerator,
            "strategy": strategy,
            "devices": devices,
            "num_nodes": num_nodes,
            "precision": precision,
            "checkpoint_io": checkpoint_io,
        }
        self._plan = resolve(arguments, plugins, self._registry)
        self._strategy = self._plan.build()
        self._precision = self._strategy.precision
        self._direct_backward = not self._strategy.changes_backward
        self._callbacks = _as_list(callbacks)
        self._loggers = [
            self._registry.create("logger", logger) if isinstance(logger, str) else logger
            for logger in _as_list(loggers)
        ]
        self._launch_with_run()
        self._notify("fabric_on_init")
        if settings.CLI_USED.flag():
            self._start_under_command_line()

    def _start_under_command_line(self) -> None:
        """Scripts for ``fabric run`` need not call ``launch``: join the processes it started, or start them."""
        launcher = self._strategy.launcher
        if launcher is None:
            self._enter_process()
        elif not launcher.requires_function:
            self.launch()

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python, NumPy and torch, and by default data loader workers too; return the seed.

        Args:
            seed: 0 to 2**32 - 1; the one of an earlier call, or 0, if not given.
            workers: seed the workers of data loaders; ``None`` means ``True`` here.
            verbose: log the seed.
        """
        return _seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)

    def __getstate__(self) -> dict[str, Any]:
        # For workers that are spawned: the registry is the process's own, `run` is wrapped again below.
        return {name: value for name, value in self.__dict__.items() if name not in ("_registry", "run")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._registry = get_registry()
        self._launch_with_run()

    def _launch_with_run(self) -> None:
        """Calling an overridden ``run`` starts the processes first."""
        if type(self).run is not Fabric.run:
            self.run = partial(self.launch, call_run, type(self).run)  # type: ignore[method-assign]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
