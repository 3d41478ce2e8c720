"""What a publication needs of the file system: names for drafts, locks that end with their holder, bytes on disk."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import sys
from contextlib import suppress
from typing import Final

if sys.platform != "win32":
    import fcntl

DRAFT_SUFFIX: Final = ".partial"
"""How the names of drafts end."""


def draft_prefix(target: str) -> str:
    """How the names of all drafts of ``target`` begin."""
    name = os.fsencode(os.path.basename(target))
    if len(name) > 200:  # the file system's limit is 255 bytes; what is added takes fewer than 40
        name = name[:180] + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()
    return "." + os.fsdecode(name) + "."


def new_name(target: str, suffix: str = DRAFT_SUFFIX) -> str:
    """A path beside ``target`` that nobody else uses."""
    return os.path.join(os.path.dirname(target), f"{draft_prefix(target)}{secrets.token_hex(8)}{suffix}")


def lock(fd: int, *, shared: bool = False) -> None:
    """Hold a lock on the open file until it is closed; wait for others who hold one.

    File systems without locks: nothing happens. Nothing can be told abandoned there, and nothing is removed.
    """
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def lock_at_once(fd: int) -> None:
    """Hold a lock on the open file that nobody shares. ``OSError`` if somebody holds one, or locks do not exist."""
    if sys.platform != "win32":
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def to_disk(fd: int) -> None:
    """Return once the open file's bytes would survive a loss of power."""
    if sys.platform == "darwin":
        with suppress(OSError):  # fsync alone stops at the drive's cache there
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def folder_to_disk(folder: str) -> None:
    """The same for the names in a folder."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that cannot sync folders
            raise
    finally:
        os.close(fd)
