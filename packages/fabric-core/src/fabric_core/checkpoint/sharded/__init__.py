"""Checkpoints that every process writes its part of, in one folder: complete or absent, safe to open, of any layout.

::

    from fabric_core.checkpoint.sharded import open_sharded, ranks_of, write_sharded

    write_sharded(path, {"model": model_state, "optimizer": optimizer_state}, {"epoch": 3}, ranks_of())
    with open_sharded(path) as checkpoint:
        checkpoint.read({"model.layer.weight": weight})

Files in the order in which a save passes through them: ``write`` (the whole), ``ranks`` (who takes part), ``draft`` and
``remote_draft`` (the folder being written), ``planning`` (who writes what), ``archive`` and ``summed`` (the files),
``manifest`` (their sizes and hashes), ``publication`` and ``exchange`` (how the draft becomes the checkpoint). And a
load: ``read`` (the whole), ``layout`` (what is where), ``folder``, ``index``, ``boxes`` and ``stored``.

Importing this package imports nothing else; a name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.layout import is_sharded as is_sharded
    from fabric_core.checkpoint.sharded.manifest import verify as verify
    from fabric_core.checkpoint.sharded.ranks import Ranks as Ranks
    from fabric_core.checkpoint.sharded.ranks import ranks_of as ranks_of
    from fabric_core.checkpoint.sharded.read import ShardedCheckpoint as ShardedCheckpoint
    from fabric_core.checkpoint.sharded.read import TensorInfo as TensorInfo
    from fabric_core.checkpoint.sharded.read import open_sharded as open_sharded
    from fabric_core.checkpoint.sharded.write import write_sharded as write_sharded

_TABLE = {
    "Ranks": "fabric_core.checkpoint.sharded.ranks:Ranks",
    "ShardedCheckpoint": "fabric_core.checkpoint.sharded.read:ShardedCheckpoint",
    "TensorInfo": "fabric_core.checkpoint.sharded.read:TensorInfo",
    "is_sharded": "fabric_core.checkpoint.sharded.layout:is_sharded",
    "open_sharded": "fabric_core.checkpoint.sharded.read:open_sharded",
    "ranks_of": "fabric_core.checkpoint.sharded.ranks:ranks_of",
    "verify": "fabric_core.checkpoint.sharded.manifest:verify",
    "write_sharded": "fabric_core.checkpoint.sharded.write:write_sharded",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
