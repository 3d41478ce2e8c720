"""What starts the processes of a node: running the script again, or starting processes of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:
    from fabric_core.launchers.script import ScriptLauncher as ScriptLauncher
    from fabric_core.launchers.spawn import SpawnLauncher as SpawnLauncher

_TABLE = {
    "ScriptLauncher": "fabric_core.launchers.script:ScriptLauncher",
    "SpawnLauncher": "fabric_core.launchers.spawn:SpawnLauncher",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
