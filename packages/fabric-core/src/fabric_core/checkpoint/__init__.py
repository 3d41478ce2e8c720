"""How a checkpoint is written, found, opened and put back. Complete or absent, safe to open, without a second copy.

A strategy needs three calls, here in the order of a run::

    from fabric_core.checkpoint.restore import restore
    from fabric_core.checkpoint.state import collect_state
    from fabric_core.checkpoint.write import write_checkpoint

    plain = collect_state(state, filter, module_state=..., optimizer_state=...)
    write_checkpoint(io, path, plain)
    rest = restore(io, path, state, strict=True, weights_only=None)

Importing this package imports nothing else; a name is loaded when it is first used. ``restore`` is imported from its
module, which has the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:
    from fabric_core.checkpoint.async_io import AsyncCheckpointIO as AsyncCheckpointIO
    from fabric_core.checkpoint.commit import publish as publish
    from fabric_core.checkpoint.lazy import OpenCheckpoint as OpenCheckpoint
    from fabric_core.checkpoint.paths import get_filesystem as get_filesystem
    from fabric_core.checkpoint.state import check_keys as check_keys
    from fabric_core.checkpoint.state import collect_state as collect_state
    from fabric_core.checkpoint.state import move_state_into as move_state_into
    from fabric_core.checkpoint.state import validate_filter as validate_filter
    from fabric_core.checkpoint.torch_io import TorchCheckpointIO as TorchCheckpointIO
    from fabric_core.checkpoint.write import write_checkpoint as write_checkpoint

_TABLE = {
    "AsyncCheckpointIO": "fabric_core.checkpoint.async_io:AsyncCheckpointIO",
    "OpenCheckpoint": "fabric_core.checkpoint.lazy:OpenCheckpoint",
    "TorchCheckpointIO": "fabric_core.checkpoint.torch_io:TorchCheckpointIO",
    "check_keys": "fabric_core.checkpoint.state:check_keys",
    "collect_state": "fabric_core.checkpoint.state:collect_state",
    "get_filesystem": "fabric_core.checkpoint.paths:get_filesystem",
    "move_state_into": "fabric_core.checkpoint.state:move_state_into",
    "publish": "fabric_core.checkpoint.commit:publish",
    "validate_filter": "fabric_core.checkpoint.state:validate_filter",
    "write_checkpoint": "fabric_core.checkpoint.write:write_checkpoint",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
