"""A checkpoint that is a folder as a single file: what a run with one process would have written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.single_file import write_file
from fabric_core.checkpoint.conversion.streams import ProgressBar, StreamedTensor, in_pieces, shown
from fabric_core.checkpoint.folder import nested
from fabric_core.checkpoint.foreign import find_foreign
from fabric_core.checkpoint.sharded.layout import is_sharded
from fabric_core.checkpoint.sharded.read import ShardedCheckpoint, open_sharded

if TYPE_CHECKING:
    from fabric_core.types import Path

SUFFIX: Final = ".consolidated"
_AHEAD: Final = 16 * 2**20  # bytes


def consolidate(
    folder: Path, output: Path | None = None, *, weights_only: bool | None = None, bar: ProgressBar | None = None
) -> str:
    """Write the checkpoint ``folder`` as one file, complete or not at all.

    ``fabric.load`` and ``torch.load`` read it. Modules and optimizers are nested as they were saved, ``{"model": {...},
    "optimizer": {"state": {...}, "param_groups": [...]}}``, optimizer state by the names of parameters, and everything
    else is beside them. One tensor is in memory at a time. One process calls it.

    Args:
        folder: what Fabric, Lightning or ``torch.distributed.checkpoint`` wrote, or a layout that a plugin reads.
        output: the file or object to write; by default beside the folder, with the suffix ``.consolidated``.
        weights_only: ``False`` runs code from the checkpoint: only for those you trust.
        bar: shows the progress.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no such checkpoint is there.
        UnsafeCheckpointError: it holds more than tensors and plain values.
        CheckpointError: it is damaged.
    """
    output = default_output(folder) if output is None else os.fspath(output)
    with streamed_folder(folder, weights_only) as state, shown(bar, state) as progress:
        write_file(output, state, progress)
    return output


def is_folder_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that is a folder, sharded or of a layout that a plugin reads."""
    return is_sharded(path) or find_foreign(path) is not None


@contextmanager
def streamed_folder(path: Path, weights_only: bool | None, extras: bool = True) -> Iterator[dict[Any, Any]]:
    """What the folder holds, with ``StreamedTensor`` in the place of the tensors of modules and optimizers.

    Without ``extras``, what is neither may be left out. ``FileNotFoundError`` if no checkpoint is there.
    """
    foreign = None if is_sharded(path) else find_foreign(path)
    if foreign is not None:
        yield foreign.read(weights_only)
        return
    with open_sharded(path, weights_only) as source:
        yield streamed_state(source, extras)


def default_output(folder: Path) -> str:
    """Where a folder's consolidated form goes if nobody says where."""
    return os.fspath(folder).rstrip("/" + os.sep) + SUFFIX


def streamed_state(source: ShardedCheckpoint, extras: bool = True) -> dict[Any, Any]:
    """The state, nested as it was saved, with its extras at the top level; tensors are read when they are written."""
    ahead = _ReadAhead(source)
    state = nested(source, lambda key: ahead.stream(key) if key in source.tensors else source.read_object(key))
    return {**state, **source.extras} if extras else state


class _ReadAhead:
    """Reads tensors in the order in which they were announced: large ones alone, small ones together with the next."""

    def __init__(self, source: ShardedCheckpoint) -> None:
        self._source = source
        self._order: list[str] = []
        self._numbers: dict[str, int] = {}
        self._read: dict[str, Tensor] = {}

    def stream(self, key: str) -> StreamedTensor:
        """Announce a tensor."""
        info = self._source.tensors[key]
        self._numbers[key] = len(self._order)
        self._order.append(key)
        return StreamedTensor(info.shape, info.dtype, lambda: self._pieces(key))

    def _pieces(self, key: str) -> Iterator[Tensor]:
        if key not in self._read:
            self._read = self._from(self._numbers[key])
        yield from in_pieces(self._read.pop(key))

    def _from(self, number: int) -> dict[str, Tensor]:
        wanted: dict[str, Tensor] = {}
        size = 0
        for key in self._order[number:]:
            info = self._source.tensors[key]
            size += info.shape.numel() * info.dtype.itemsize
            if wanted and size > _AHEAD:
                break
            wanted[key] = torch.empty(info.shape, dtype=info.dtype)
        self._source.read(wanted)
        return wanted
