"""The folder that is being written, and how it becomes the checkpoint.

The draft is a folder beside the target, ``.NAME.UNIQUE.partial``. Its ``manifest.json`` exists from the start, empty,
and every process that writes holds a lock on it, which ends with the process: so the next save of the same target can
tell a draft that nobody works on, and removes it. Publication is one step: a rename where nothing was, an exchange of
the two folders where something was. What was there then has the draft's name, and is removed.

Where folders cannot be exchanged, the old one is renamed to ``.NAME.UNIQUE.previous`` first. Between that rename and
the next one, readers find nothing at the target and take the folder of that name; so does the next save.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol, cast

from fabric_core.checkpoint.durable import DRAFT_SUFFIX, folder_to_disk, lock, lock_at_once, new_name, to_disk
from fabric_core.checkpoint.paths import is_http, is_remote, resolve
from fabric_core.checkpoint.sharded.exchange import exchange
from fabric_core.checkpoint.sharded.layout import (
    MANIFEST,
    PREVIOUS_SUFFIX,
    holds_checkpoint,
    is_part,
    moved_aside,
    siblings,
)
from fabric_core.checkpoint.sharded.summed import SummedFile
from fabric_core.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.manifest import Manifest
    from fabric_core.types import Path

_PATIENCE: Final = 5.0  # seconds; for how long a network file system may hide a folder that another machine has made


class Draft(Protocol):
    """A checkpoint that is being written.

    Attributes:
        generation: goes into the names of files; empty where the folder keeps them apart.
        address: what another process needs to ``join``.
    """

    generation: str
    address: tuple[str, str]

    def create(self, name: str) -> SummedFile:
        """A file of the draft; its bytes are safe when it was closed without an error."""
        ...

    def publish(self, manifest: Manifest) -> None:
        """Make the draft the checkpoint. Rank 0 calls it when all files of all ranks are closed."""
        ...

    def discard(self) -> None:
        """Remove the draft, unless it was published. Rank 0 calls it."""
        ...

    def close(self) -> None:
        """This process is done with the draft. Every rank calls it."""
        ...


def begin_draft(path: Path) -> Draft:
    """Start a draft of ``path``; rank 0 calls it. What other saves left behind is removed.

    Raises:
        IsADirectoryError: a folder is there that holds other things than a checkpoint.
        OSError: as the system says.
    """
    if is_http(path):
        raise UnsupportedError(f"{os.fspath(path)!r} is a web address: nothing can be written there.")
    if is_remote(path):
        from fabric_core.checkpoint.sharded.remote_draft import RemoteDraft

        return RemoteDraft.begin(resolve(path))
    return LocalDraft.begin(path)


def join_draft(address: tuple[str, str]) -> Draft:
    """Take part in the draft that rank 0 has started."""
    where, generation = address
    if generation:
        from fabric_core.checkpoint.sharded.remote_draft import RemoteDraft

        return RemoteDraft(where, generation)
    return LocalDraft.join(where)


class LocalDraft:
    """A draft on the local file system, or one that is mounted on every machine that takes part."""

    generation = ""

    def __init__(self, folder: str, held: BinaryIO, target: str = "") -> None:
        self.address = (folder, "")
        self._folder, self._target, self._held = folder, target, held
        self._published = False

    @classmethod
    def begin(cls, path: Path) -> LocalDraft:
        """The draft of ``path``, as ``begin_draft`` says."""
        target = os.path.realpath(resolve(path))
        _refuse(target)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _recover(target)
        _remove_abandoned(target)
        while True:
            folder = new_name(target)
            os.mkdir(folder)
            with suppress(FileNotFoundError):  # another save took the empty folder for abandoned
                return cls(folder, _hold(os.path.join(folder, MANIFEST), "x+b"), target)

    @classmethod
    def join(cls, folder: str) -> LocalDraft:
        """The draft in ``folder``, which another process has begun."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return cls(folder, _hold(os.path.join(folder, MANIFEST), "r+b"))
            except FileNotFoundError as error:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"This machine does not see {folder!r}, which rank 0 has made. A sharded checkpoint is "
                        "written by all machines into one folder: pass a path on a file system that they share."
                    ) from error
            with suppress(OSError):
                os.listdir(os.path.dirname(folder))  # makes a network file system look again
            time.sleep(0.05)

    def create(self, name: str) -> SummedFile:
        """A file of the draft; its bytes are on disk when it was closed without an error."""
        file = open(os.path.join(self._folder, name), "xb", buffering=0)  # noqa: SIM115 - closed by what is returned
        return SummedFile(file, lambda: to_disk(file.fileno()))

    def publish(self, manifest: Manifest) -> None:
        """Make the draft the checkpoint; rank 0 calls it when all files of all ranks are closed."""
        self._held.write(manifest.dumps())
        self._held.flush()
        to_disk(self._held.fileno())
        with suppress(FileNotFoundError):
            os.chmod(self._folder, _folder_mode(self._target, self._folder))
        folder_to_disk(self._folder)
        if sys.platform == "win32":
            self._held.close()  # a folder with open files cannot be renamed there
        old = _put_in_place(self._folder, self._target)
        self._published = True
        folder_to_disk(os.path.dirname(self._target))
        for left in (old, *moved_aside(self._target)):
            if left is not None:
                _remove(left, self._target)

    def discard(self) -> None:
        """Remove the draft, unless it was published."""
        if not self._published:
            self._held.close()
            _remove(self._folder, self._target)

    def close(self) -> None:
        """Let go of the draft."""
        self._held.close()


def _refuse(target: str) -> None:
    """``OSError`` if what is at the target must not be replaced."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode) and not holds_checkpoint(target) and os.listdir(target):
        raise IsADirectoryError(
            errno.EISDIR,
            "The folder holds other things than a checkpoint, and would be replaced. Choose another name, or empty it",
            target,
        )
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise FileExistsError(errno.EEXIST, "Neither a checkpoint nor a file, and cannot be replaced by one", target)
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "The checkpoint to replace is write-protected", target)


def _recover(target: str) -> None:
    """Put a checkpoint back that an interrupted replacement has moved aside."""
    aside = moved_aside(target)
    if aside and not os.path.lexists(target):
        os.rename(aside[0], target)


def _put_in_place(draft: str, target: str) -> str | None:
    """Rename the draft to the target; where what was there is now, if something was."""
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


def _remove_abandoned(target: str) -> None:
    """Remove drafts of the same target that nobody works on."""
    for path in siblings(target, DRAFT_SUFFIX):
        with suppress(OSError):  # alive, or already gone, or not ours
            _remove_if_unlocked(path, target)


def _remove_if_unlocked(path: str, target: str) -> None:
    held = os.path.join(path, MANIFEST) if os.path.isdir(path) else path
    try:
        file = open(held, "r+b")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        try:
            os.rmdir(path)  # works for a draft whose writer has not come to its lock yet, which then starts again
            return
        except OSError:
            if os.path.exists(held):
                return
        _remove(path, target)
        return
    with file:
        lock_at_once(file.fileno())
        if sys.platform == "win32":
            file.close()
            os.rename(path, path + "-")  # fails while another process has a file of it open
            path += "-"
        _remove(path, target)


def _hold(path: str, mode: str) -> BinaryIO:
    file = cast("BinaryIO", open(path, mode))  # noqa: SIM115 - held until the draft is closed
    lock(file.fileno(), shared=True)
    if os.path.exists(path):
        return file
    file.close()
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _remove(path: str, target: str) -> None:
    """Remove a file or folder as far as possible; what stays is removed by the next save.

    Files that somebody has put beside those of a checkpoint are no part of it: they move to the folder at ``target``.
    """
    if not os.path.isdir(path) or os.path.islink(path):
        with suppress(OSError):
            os.unlink(path)
        return
    with suppress(OSError):
        for name in os.listdir(path):
            if not is_part(name) and not os.path.lexists(os.path.join(target, name)):
                os.rename(os.path.join(path, name), os.path.join(target, name))
    shutil.rmtree(path, ignore_errors=True)


def _folder_mode(target: str, otherwise: str) -> int:
    """The permissions for the new folder: those of the folder that it replaces."""
    found = os.stat(target).st_mode
    return stat.S_IMODE(found if stat.S_ISDIR(found) else os.stat(otherwise).st_mode)
