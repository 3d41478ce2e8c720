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

import importlib
from typing import TYPE_CHECKING, Any

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

_HOME = {
    "Accelerator": "accelerator",
    "CheckpointIO": "checkpoint",
    "ClusterEnvironment": "environment",
    "GradientSync": "strategy",
    "Launcher": "launcher",
    "Logger": "logger",
    "Precision": "precision",
    "Strategy": "strategy",
}
__all__ = ["API_LEVEL", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
