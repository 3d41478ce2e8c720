"""Checkpoint IO: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "AsyncCheckpointIO": "fabric_core.checkpoint.async_io:AsyncCheckpointIO",
    "CheckpointIO": "fabric_core.abc.checkpoint:CheckpointIO",
    "TorchCheckpointIO": "fabric_core.checkpoint.torch_io:TorchCheckpointIO",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
