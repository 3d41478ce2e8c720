"""Opening a checkpoint for loading: a file, a folder, or what a plugin reads; by every rank or by rank 0 for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.folder import FolderCheckpoint, open_folder
from fabric_core.checkpoint.foreign import ForeignCheckpoint, find_foreign, find_foreign_around, open_foreign
from fabric_core.checkpoint.lazy import MappedCheckpoint, OpenCheckpoint
from fabric_core.checkpoint.paths import is_remote, resolve
from fabric_core.checkpoint.sharded.layout import file_aside, find_folder, is_sharded
from fabric_core.errors import CheckpointError, UsageError
from fabric_core.keywords import accepted

if TYPE_CHECKING:
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path

_READ_BY_ALL: Final = (MappedCheckpoint, FolderCheckpoint, ForeignCheckpoint)  # without having the whole in memory


@contextmanager
def opened(
    io: CheckpointIO, path: Path, weights_only: bool | None, ranks: Ranks | None = None, *, spare: bool = False
) -> Iterator[OpenCheckpoint]:
    """The checkpoint at ``path``.

    Args:
        io: reads files; checkpoints that are folders do not go through it.
        path: where it is.
        weights_only: ``False`` runs code from it.
        ranks: those who load together; ``None`` for a process on its own. They all must call. Where some cannot see a
            local path that rank 0 sees, rank 0 reads for all.
        spare: let rank 0 read for all too if a rank could read no part without having the whole in memory.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        CheckpointError: it is damaged. If rank 0 reads for all, the others raise its errors as ``together`` says.
    """
    with ExitStack() as stack:
        if ranks is None or ranks.size == 1:
            yield stack.enter_context(_open(io, path, weights_only))
            return
        failed = f"{os.fspath(path)!r} was not opened"
        seen = ranks.gather(together(ranks, lambda: _is_visible(path), failed))
        torn = seen[0] and not all(seen)
        if not torn and not spare:
            yield stack.enter_context(_open(io, path, weights_only))
            return
        is_first = ranks.rank == 0
        source = together(
            ranks, lambda: stack.enter_context(_open(io, path, weights_only)) if is_first else None, failed
        )
        if ranks.broadcast(isinstance(source, _READ_BY_ALL) and not torn):
            yield source if source is not None else stack.enter_context(_open(io, path, weights_only))
            return
        from fabric_core.checkpoint.relay import RelayedCheckpoint

        yield RelayedCheckpoint(source, ranks)


def _is_visible(path: Path) -> bool:
    if is_remote(path) or os.path.exists(resolve(path)):
        return True
    return find_folder(path) is not None or file_aside(path) is not None or find_foreign(path) is not None


def _open(io: CheckpointIO, path: Path, weights_only: bool | None) -> AbstractContextManager[OpenCheckpoint]:
    if _is_folder(path):
        return open_folder(path, weights_only)
    foreign = find_foreign(path)
    if foreign is not None:
        return open_foreign(foreign, weights_only)
    return open_file(io, path if is_remote(path) else file_aside(path) or path, weights_only)


def _is_folder(path: Path) -> bool:
    try:
        return is_sharded(path)
    except (UsageError, ImportError, ValueError):  # a URL that means something to the CheckpointIO only
        return False


@contextmanager
def open_file(io: CheckpointIO, path: Path, weights_only: bool | None) -> Iterator[OpenCheckpoint]:
    """The file through ``open_checkpoint`` if that is as good as the implementation's ``load_checkpoint``.

    ``CheckpointError`` if it cannot be read and lies in a checkpoint that a plugin reads as a whole.
    """
    with ExitStack() as stack:
        try:
            source = stack.enter_context(_open_alone(io, path, weights_only))
        except Exception as error:
            whole = find_foreign_around(path)
            if whole is None:
                raise
            raise CheckpointError(
                f"{os.fspath(path)!r} cannot be read by itself: it is one file of the {whole.format} checkpoint in the "
                f"folder {whole.path!r}. Pass that folder."
            ) from error
        yield source


@contextmanager
def _open_alone(io: CheckpointIO, path: Path, weights_only: bool | None) -> Iterator[OpenCheckpoint]:
    if _can_open(type(io)):
        opening: AbstractContextManager[OpenCheckpoint] = io.open_checkpoint(path, weights_only)  # type: ignore[attr-defined]
        with opening as source:
            yield source
    else:
        yield OpenCheckpoint(io.load_checkpoint(path, **accepted(io.load_checkpoint, {"weights_only": weights_only})))


def _can_open(kind: type[CheckpointIO]) -> bool:
    """Whether ``open_checkpoint`` exists and no subclass has replaced ``load_checkpoint`` alone, say to decrypt."""
    for base in kind.__mro__:
        if "open_checkpoint" in vars(base):
            return True
        if "load_checkpoint" in vars(base):
            return False
    return False
