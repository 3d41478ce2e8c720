"""Committing a folder that all ranks write: it is there completely, or what was there before still is.

For plugins whose library writes a layout of its own::

    from fabric_core.checkpoint.folder_commit import FolderLayout, commit_folder
    from fabric_core.checkpoint.sharded import ranks_of

    LAYOUT = FolderLayout(marker="index.json", held="index.json", is_part=lambda name: name.endswith((".bin", ".json")))
    commit_folder(path, write_my_files, b"{}", LAYOUT, ranks_of())

The draft is beside the target, and takes its place in one step when every rank has succeeded. A process may be killed
at any moment: the next save removes what it left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.durable import folder_to_disk, to_disk
from fabric_core.checkpoint.paths import is_remote
from fabric_core.checkpoint.sharded.draft import LocalDraft
from fabric_core.checkpoint.sharded.layout import FolderLayout as FolderLayout
from fabric_core.checkpoint.sharded.layout import find_folder as find_folder
from fabric_core.errors import UnsupportedError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path


def commit_folder(path: Path, write: Callable[[str], None], content: bytes, layout: FolderLayout, ranks: Ranks) -> None:
    """Let every rank write its files into one folder, then make that folder ``path``, all at once and durably.

    A checkpoint there, of any layout that is known, is replaced; what else lies in its folder moves to the new one.

    Args:
        path: a local folder that all ranks see; rank 0's counts.
        write: called on every rank with the draft's folder; writes files and folders there that ``layout`` knows. It
            exchanges nothing with other ranks, or all of them get through it: one that raises is not waited for.
        content: of the file ``layout.held``, which ``write`` leaves alone; rank 0's counts.
        layout: what the folder looks like.
        ranks: who writes. All of them call this.

    Raises:
        UnsupportedError: ``path`` is a URL of a store, which has no rename.
        IsADirectoryError: a folder is there that holds no checkpoint, or also things with the names of new files.
        Exception: what ``write`` raised, on that rank; on the others as ``together`` says. What was at ``path`` before
            is still there.
    """
    path = ranks.broadcast(path)
    failed = f"The checkpoint {os.fspath(path)!r} was not written"
    if is_remote(path):
        raise UnsupportedError(
            f"{os.fspath(path)!r} is in a store, and this checkpoint is a folder of files that only a local file "
            "system can put in place in one step. Save to a local or mounted path, and copy the folder."
        )
    is_first = ranks.rank == 0
    draft = together(ranks, lambda: LocalDraft.begin(path, layout) if is_first else None, failed)
    try:
        folder = ranks.broadcast(None if draft is None else draft.folder)
        assert folder is not None
        draft = together(ranks, lambda: draft or LocalDraft.join(folder, layout), failed)
        mine = draft
        together(ranks, lambda: _written(write, folder), failed)
        together(ranks, lambda: _completed(mine, folder, content) if is_first else None, failed)
    except BaseException:
        if draft is not None and is_first:
            draft.discard()
        raise
    finally:
        if draft is not None:
            draft.close()


def _written(write: Callable[[str], None], folder: str) -> None:
    write(folder)
    for place, _, names in os.walk(folder):  # all of them: what is on disk already costs nothing
        for name in names:
            _file_to_disk(os.path.join(place, name))


def _completed(draft: LocalDraft, folder: str, content: bytes) -> None:
    for place, _, _ in os.walk(folder, topdown=False):
        folder_to_disk(place)
    draft.complete(content)


def _file_to_disk(path: str) -> None:
    try:
        with open(path, "rb") as file:
            to_disk(file.fileno())
    except FileNotFoundError:  # another rank's, and only there for a moment
        return
