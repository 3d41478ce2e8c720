"""How a finished draft becomes what is at a path, and how what an interrupted save has left is put right.

What is at the path may be a checkpoint of another layout, a plugin's for instance: its parts go, as those of the same
layout do.

Publication is one step: a rename where nothing was, an exchange of the two where something was. What was there then has
the draft's name, and is removed. Where the system cannot exchange, the old one is renamed to
``.NAME.UNIQUE.previous`` first. Between that rename and the next one, readers find nothing at the target and take the
folder of that name; so does the next save.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from fabric_core.checkpoint.durable import DRAFT_SUFFIX, folder_to_disk, lock_at_once, new_name
from fabric_core.checkpoint.foreign import layout_of
from fabric_core.checkpoint.paths import is_remote, resolve
from fabric_core.checkpoint.sharded.exchange import exchange
from fabric_core.checkpoint.sharded.layout import PREVIOUS_SUFFIX, SHARDED, FolderLayout, moved_aside, siblings

if TYPE_CHECKING:
    from fabric_core.types import Path


def recover(target: str, layout: FolderLayout = SHARDED) -> None:
    """Put back what an interrupted replacement has moved aside, if nothing is at the target; else remove it."""
    aside = moved_aside(target)
    usable = [path for path in aside if not os.path.isdir(path) or holds_checkpoint(path, layout)]  # not half removed
    if usable and not os.path.lexists(target):
        os.rename(usable[0], target)
        aside.remove(usable[0])
    if os.path.lexists(target):
        for path in aside:
            remove(path, target, layout)


def holds_checkpoint(folder: str, layout: FolderLayout = SHARDED) -> bool:
    """Whether the local folder holds a checkpoint, of this layout or any other that is known."""
    return layout.is_in(folder) or layout_of(folder) is not None


def is_folder_to_replace(path: Path) -> bool:
    """Whether the local folder of a checkpoint is at ``path``, put back there if its replacement was interrupted."""
    if is_remote(path):
        return False
    target = os.path.realpath(resolve(path))
    recover(target)
    return os.path.isdir(target) and holds_checkpoint(target)


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
            remove(left, target, layout)


def remove_abandoned(target: str, layout: FolderLayout = SHARDED) -> None:
    """Remove drafts of the same target that nobody works on."""
    for path in siblings(target, DRAFT_SUFFIX):
        with suppress(OSError):  # alive, or already gone, or not ours
            _remove_if_unlocked(path, target, layout)


def _remove_if_unlocked(path: str, target: str, layout: FolderLayout) -> None:
    held = os.path.join(path, layout.held) if os.path.isdir(path) else path
    try:
        file = open(held, "r+b")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        try:
            os.rmdir(path)  # works for a draft whose writer has not come to its lock yet, which then starts again
            return
        except OSError:
            if os.path.exists(held):
                return
        remove(path, target, layout)
        return
    with file:
        lock_at_once(file.fileno())
        if sys.platform == "win32":
            file.close()
            os.rename(path, path + "-")  # fails while another process has a file of it open
            path += "-"
        remove(path, target, layout)


def remove(path: str, target: str, layout: FolderLayout = SHARDED) -> None:
    """Remove a draft, or what was at the target before, as far as possible; what stays is removed by the next save.

    Files that somebody has put beside those of a checkpoint are no part of it: they move to the folder at ``target``,
    and stay where they are if there is none.
    """
    if not os.path.isdir(path) or os.path.islink(path):
        _delete(path)
        return
    layouts = {layout, SHARDED, layout_of(path) or layout}
    for one in layouts:  # markers first: what is removed in part must not be taken for a checkpoint
        _delete(os.path.join(path, one.marker))
    with suppress(OSError):
        for name in os.listdir(path):
            if any(one.is_part(name) for one in layouts) or os.path.lexists(os.path.join(target, name)):
                _delete(os.path.join(path, name))
            else:
                with suppress(OSError):
                    os.rename(os.path.join(path, name), os.path.join(target, name))
        os.rmdir(path)


def _delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)
