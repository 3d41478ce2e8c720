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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.checkpoint.commit import publish as publish
    from fabric_core.checkpoint.lazy import OpenCheckpoint as OpenCheckpoint
    from fabric_core.checkpoint.paths import get_filesystem as get_filesystem
    from fabric_core.checkpoint.state import check_keys as check_keys
    from fabric_core.checkpoint.state import collect_state as collect_state
    from fabric_core.checkpoint.state import move_state_into as move_state_into
    from fabric_core.checkpoint.state import validate_filter as validate_filter
    from fabric_core.checkpoint.torch_io import TorchCheckpointIO as TorchCheckpointIO
    from fabric_core.checkpoint.write import write_checkpoint as write_checkpoint

_HOME = {
    "OpenCheckpoint": "lazy",
    "TorchCheckpointIO": "torch_io",
    "check_keys": "state",
    "collect_state": "state",
    "get_filesystem": "paths",
    "move_state_into": "state",
    "publish": "commit",
    "validate_filter": "state",
    "write_checkpoint": "write",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
