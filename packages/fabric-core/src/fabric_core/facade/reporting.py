"""Callbacks and loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fabric_core.callbacks import call_hook
from fabric_core.collections import convert_tensors_to_scalars
from fabric_core.errors import NoLoggerError
from fabric_core.facade.base import FabricBase

if TYPE_CHECKING:
    from fabric_core.abc.logger import Logger


class Reporting(FabricBase):
    """``call``, ``log`` and ``log_dict``."""

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks; a list of this object's own, to which more can be added."""
        return self._callbacks

    @property
    def loggers(self) -> list[Logger]:
        """The loggers; a list of this object's own, to which more can be added."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger; ``IndexError`` if there is none."""
        if not self._loggers:
            raise NoLoggerError(
                "fabric.logger: this Fabric has no logger. Pass one, Fabric(loggers=...), or append to fabric.loggers."
            )
        return self._loggers[0]

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method ``hook_name`` of every callback that has it, in order.

        Keywords that a method does not take are left out. ``on_after_setup(fabric, module)`` and
        ``on_after_optimizer_step(strategy, optimizer)`` are called by Fabric itself; all other names are yours.
        """
        if self._callbacks:
            call_hook(self._callbacks, hook_name, args, kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Send one scalar to every logger. Tensors of one element are fine; ``ValueError`` for larger ones."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send several scalars to every logger. ``step`` counts by itself in most loggers if not given."""
        scalars = convert_tensors_to_scalars(metrics)
        for logger in self._loggers:
            logger.log_metrics(scalars, step=step)
