"""Publishing a file: it is there completely, or what was there before still is. Nothing in between, ever.

The bytes go to a file beside the target, reach the disk, and one rename makes them the target. Where the system can,
the file has no name until then, so a killed process leaves nothing behind; elsewhere it is ``.NAME.UNIQUE.partial``,
locked while its writer lives, and the next publication of the same target removes those that nobody holds.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

from fabric_core.checkpoint.durable import (
    folder_to_disk,
    lock,
    new_name,
    to_disk,
)
from fabric_core.checkpoint.paths import is_remote, resolve
from fabric_core.checkpoint.sharded.publication import recover, remove_abandoned

if TYPE_CHECKING:
    from fabric_core.types import Path


@contextmanager
def publish(path: Path, *, anonymous: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` when the block ends without an error, all at once and durably.

    If the block raises, or the process dies, ``path`` stays what it was. Parent folders are made; a symlink stays and
    what it points to is replaced; a replaced file's permissions are kept. One process per target is the rule; of
    several, the last to finish wins.

    Args:
        path: local path or URL. URLs need ``fabric-core[remote]``.
        anonymous: use a file without a name until the end, where the system offers it.

    Raises:
        IsADirectoryError: ``path`` is a folder, or was one before its replacement was interrupted.
        PermissionError: the folder, or the file to replace, is not writable.
    """
    if is_remote(path):
        from fabric_core.checkpoint.remote import publish_remote

        with publish_remote(resolve(path)) as file:
            yield file
        return
    target = os.path.realpath(resolve(path))
    recover(target)  # a sharded checkpoint that was moved aside is one at the target, and else would come back later
    mode = _mode_of(target)
    if mode is not None:
        _refuse_protected(target, mode)
    if mode is not None and not stat.S_ISREG(mode):
        with open(target, "wb") as file:  # a device or a pipe must not be replaced by a file
            yield file
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    remove_abandoned(target)
    draft = _open_nameless(target) if anonymous else None
    if draft is None:
        draft = _open_named(target)
    with draft:
        yield draft.file
        draft.publish()


class _Draft:
    """The file being written: without a name, or under the name ``name``. Leaving it unpublished removes it."""

    def __init__(self, file: io.BufferedWriter, target: str, name: str | None) -> None:
        self.file, self._target, self._name = file, target, name

    def __enter__(self) -> _Draft:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(OSError, ValueError):  # what is still in the buffer is of no use any more
                self.file.close()
        finally:
            if self._name is not None:
                with suppress(FileNotFoundError):
                    os.unlink(self._name)

    def publish(self) -> None:
        """Make the file the target."""
        mode = _mode_of(self._target)
        if mode is not None:
            named = self.file.fileno() if os.chmod in os.supports_fd else self._name or ""
            os.chmod(named, stat.S_IMODE(mode))
        self.file.flush()
        to_disk(self.file.fileno())
        if self._name is None:
            self._name = new_name(self._target)
            # A directory descriptor makes Python call linkat, which can follow the link in /proc; link cannot.
            os.link(f"/proc/self/fd/{self.file.fileno()}", self._name, src_dir_fd=0, follow_symlinks=True)
        if sys.platform == "win32":
            self.file.close()  # an open file cannot be renamed there
        os.replace(self._name, self._target)
        self._name = None
        folder_to_disk(os.path.dirname(self._target))


def _open_nameless(target: str) -> _Draft | None:
    """A draft that vanishes with its process; ``None`` where the system has no such thing."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        fd = os.open(os.path.dirname(target), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        # Old kernels and some file systems do not know the flag; everything else is the caller's problem.
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None
        raise
    lock(fd)  # it will have a name for a moment between link and rename
    return _Draft(os.fdopen(fd, "wb"), target, None)


def _open_named(target: str) -> _Draft:
    """A draft under a name of its own, locked."""
    while True:
        name = new_name(target)
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        lock(fd)
        if os.fstat(fd).st_nlink:
            return _Draft(os.fdopen(fd, "wb"), target, name)
        os.close(fd)  # another process took it for abandoned before the lock was held


def _refuse_protected(target: str, mode: int) -> None:
    """``OSError`` for a folder, and for a file that must not be written; ``mode`` is the target's."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            errno.EISDIR, "A checkpoint file cannot replace a folder. Choose another name, or remove the folder", target
        )
    if not os.access(
        target, os.W_OK, effective_ids=os.access in os.supports_effective_ids
    ):  # a rename would succeed, but whoever protected the file meant it
        raise PermissionError(errno.EACCES, "The checkpoint to replace is write-protected", target)


def _mode_of(target: str) -> int | None:
    """Type and permissions of what is at ``target``, ``None`` if nothing is."""
    try:
        return os.stat(target).st_mode
    except FileNotFoundError:
        return None
