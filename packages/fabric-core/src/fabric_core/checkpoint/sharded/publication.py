"""How a finished draft becomes what is at a path, and how what an interrupted save has left is put right.

Publication is one step: a rename where nothing was, an exchange of the two where something was. What was there then has
the draft's name, and is removed. Where the system cannot exchange, the old one is renamed to
``.NAME.UNIQUE.previous`` first. Between that rename and the next one, readers find nothing at the target and take what
has that name; so does the next save.

What was at the path may be a checkpoint of another layout, a plugin's for instance. Its marker tells which, and so
which of its files are its own; all others have moved on before the marker goes. A draft without one is ours alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from fabric_core.checkpoint.durable import DRAFT_SUFFIX, folder_to_disk, lock_at_once, new_name
from fabric_core.checkpoint.foreign import layout_of
from fabric_core.checkpoint.paths import is_remote, resolve
from fabric_core.checkpoint.sharded.exchange import exchange
from fabric_core.checkpoint.sharded.layout import PREVIOUS_SUFFIX, SHARDED, FolderLayout, moved_aside, siblings

if TYPE_CHECKING:
    from fabric_core.types import Path

_MOST: Final = 64  # files held at a time; a process cannot open them all


def recover(target: str, layout: FolderLayout = SHARDED) -> None:
    """Put back what an interrupted replacement has moved aside, if nothing is at the target; else remove it."""
    aside = moved_aside(target)
    usable = [path for path in aside if not os.path.isdir(path) or layout_in(path, layout) is not None]
    if usable and not os.path.lexists(target):
        os.rename(usable[0], target)
        aside.remove(usable[0])
    if os.path.lexists(target):
        for path in aside:
            retire(path, target, layout)


def layout_in(folder: str, layout: FolderLayout = SHARDED) -> FolderLayout | None:
    """The layout of the checkpoint in a local folder: core's, a plugin's, or else ``layout``; ``None`` without one."""
    return layout_of(folder) or (layout if layout.is_in(folder) else None)


def is_folder_to_replace(path: Path) -> bool:
    """Whether the local folder of a checkpoint is at ``path``, put back there if its replacement was interrupted."""
    if is_remote(path):
        return False
    target = os.path.realpath(resolve(path))
    if not os.path.lexists(target):
        recover(target)  # otherwise whoever replaces it does
    return os.path.isdir(target) and layout_in(target) is not None


def put_in_place(draft: str, target: str) -> str | None:
    """Make the finished file or folder ``draft`` the target; where what was there is now, if something was.

    The caller makes that durable and removes the old one with ``finish``.
    """
    if not os.path.lexists(target):
        os.rename(draft, target)
        return None
    if exchange(draft, target):
        return draft
    aside = new_name(target, PREVIOUS_SUFFIX)
    os.rename(target, aside)
    try:
        os.rename(draft, target)
    except BaseException:
        os.rename(aside, target)
        raise
    return aside


def finish(target: str, old: str | None, layout: FolderLayout = SHARDED) -> None:
    """After ``put_in_place``: wait until the disk has the new names, then remove what was there before."""
    folder_to_disk(os.path.dirname(target))
    for left in (old, *moved_aside(target)):
        if left is not None:
            retire(left, target, layout)


def retire(old: str, target: str, layout: FolderLayout = SHARDED) -> None:
    """Remove what was at the target before, as far as possible; the next save tries again.

    Files that somebody has put beside those of a checkpoint are no part of it: they move to the folder at ``target``.
    If they cannot, or nobody knows the layout any more, all of it stays.
    """
    if not os.path.isdir(old) or os.path.islink(old):
        discard(old)
        return
    known = layout_in(old, layout)
    if known is None:
        return
    with suppress(OSError):
        for name in os.listdir(old):
            if not known.is_part(name) and not os.path.lexists(os.path.join(target, name)):
                os.rename(os.path.join(old, name), os.path.join(target, name))
        if old.endswith(PREVIOUS_SUFFIX):  # what is removed in part must not be taken for a checkpoint
            old, aside = new_name(target), old
            os.rename(aside, old)
        discard(os.path.join(old, known.marker))
        discard(old)


def discard(path: str) -> None:
    """Remove a file, or a folder with everything in it, as far as possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def remove_abandoned(target: str, layout: FolderLayout = SHARDED) -> None:
    """Remove drafts of the same target, files and folders of any layout, that nobody works on."""
    for path in siblings(target, DRAFT_SUFFIX):
        with suppress(OSError):  # alive, or already gone, or not ours
            _remove_if_unlocked(path, target, layout)


def _remove_if_unlocked(path: str, target: str, layout: FolderLayout) -> None:
    if os.path.isdir(path) and not os.listdir(path):
        os.rmdir(path)  # its writer may not have come to its lock yet, and then starts again
        return
    with ExitStack() as held:
        for file in _held_files(path):
            opened = held.enter_context(open(file, "r+b"))
            lock_at_once(opened.fileno())
        if sys.platform == "win32":
            held.close()
            os.rename(path, path + "-")  # fails while another process has it, or a file of it, open
            path += "-"
        if os.path.isdir(path) and layout_in(path, layout) is not None:
            retire(path, target, layout)  # it may have been at the target, and hold files of somebody
        else:
            discard(path)


def _held_files(draft: str) -> list[str]:
    """Those that the draft's writers hold. In a folder it depends on the layout which one that is: a small one."""
    if not os.path.isdir(draft):
        return [draft]
    files = [entry for entry in os.scandir(draft) if entry.is_file(follow_symlinks=False)]
    return [entry.path for entry in sorted(files, key=lambda entry: entry.stat().st_size)[:_MOST]]
