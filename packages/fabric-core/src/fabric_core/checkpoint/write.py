"""Handing a collected state to whatever writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric_core.keywords import accepted

if TYPE_CHECKING:
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.types import Path


def write_checkpoint(io: CheckpointIO, path: Path, state: dict[str, Any], storage_options: Any = None) -> None:
    """Write ``state`` to ``path`` through ``io``. One process calls it.

    An ``io`` whose ``save_checkpoint`` has no ``storage_options`` works as long as none are given.
    """
    if storage_options is None:
        io.save_checkpoint(state, path, **accepted(io.save_checkpoint, {"storage_options": None}))
    else:
        io.save_checkpoint(state, path, storage_options=storage_options)
