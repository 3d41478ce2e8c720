"""The contracts: what a plugin author subclasses. One short file each; read the one you need.

A plugin is a distribution with an entry point and a class::

    # pyproject.toml
    [project.entry-points."fabric.strategies"]
    my-plugin = "fabric_my_plugin.strategy:MyStrategy"

    # fabric_my_plugin/strategy.py
    from fabric_core.abc import Strategy

    class MyStrategy(Strategy): ...

After ``pip install``, ``Fabric(strategy="my-plugin")`` finds it. The groups are ``fabric.accelerators``,
``fabric.strategies``, ``fabric.precision``, ``fabric.environments``, ``fabric.checkpoint_io`` and ``fabric.loggers``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:
    from fabric_core.abc.accelerator import Accelerator as Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO as CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment as ClusterEnvironment
    from fabric_core.abc.launcher import Launcher as Launcher
    from fabric_core.abc.logger import Logger as Logger
    from fabric_core.abc.precision import Precision as Precision
    from fabric_core.abc.strategy import GradientSync as GradientSync
    from fabric_core.abc.strategy import Strategy as Strategy

API_LEVEL = "1"
"""The version of the contracts. Within a level, changes are additions only."""

_TABLE = {
    "Accelerator": "fabric_core.abc.accelerator:Accelerator",
    "CheckpointIO": "fabric_core.abc.checkpoint:CheckpointIO",
    "ClusterEnvironment": "fabric_core.abc.environment:ClusterEnvironment",
    "GradientSync": "fabric_core.abc.strategy:GradientSync",
    "Launcher": "fabric_core.abc.launcher:Launcher",
    "Logger": "fabric_core.abc.logger:Logger",
    "Precision": "fabric_core.abc.precision:Precision",
    "Strategy": "fabric_core.abc.strategy:Strategy",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = ["API_LEVEL", *sorted(_TABLE)]
