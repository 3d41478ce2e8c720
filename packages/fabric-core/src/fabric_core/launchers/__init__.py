"""What starts the processes of a node: running the script again, or starting processes of this one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.launchers.script import ScriptLauncher as ScriptLauncher
    from fabric_core.launchers.spawn import SpawnLauncher as SpawnLauncher

_HOME = {"ScriptLauncher": "script", "SpawnLauncher": "spawn"}
__all__ = ["ScriptLauncher", "SpawnLauncher"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
