"""Publishing to a store that fsspec reaches: the object is there completely, or what was there before still is."""

from __future__ import annotations

import errno
import importlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from fabric_core.checkpoint.paths import open_filesystem


@contextmanager
def publish_remote(url: str) -> Iterator[BinaryIO]:
    """A file to write to, which becomes the object ``url`` when the block ends without an error."""
    filesystem, path = open_filesystem(url)
    if filesystem.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "A checkpoint file cannot replace a folder. Choose another name", url)
    folder, _, name = path.rpartition("/")
    if folder:
        filesystem.makedirs(folder, exist_ok=True)
    draft = f"{folder}/.{name}.{secrets.token_hex(8)}.partial"
    held_back = _hold_back(url)
    write = _discarded_on_error(held_back, path) if _can_discard(held_back, draft) else _moved(filesystem, draft, path)
    with write as file:
        yield file


@contextmanager
def _discarded_on_error(filesystem: Any, path: str) -> Iterator[BinaryIO]:
    """For stores that can hold a written object back until it is committed."""
    file = filesystem.open(path, "wb")
    try:
        yield file
        file.close()
    except BaseException:
        with suppress(Exception):
            _discard(file)
        raise
    file.commit()


def _discard(file: Any) -> None:
    """Give up a file, for good: one that is not closed would begin to upload when it is deleted, say at exit."""
    file.discard()
    with suppress(AttributeError):  # files in memory compute it
        file.closed = True


@contextmanager
def _moved(filesystem: Any, draft: str, path: str) -> Iterator[BinaryIO]:
    """For stores where closing a file publishes whatever was written so far: another name, moved at the end."""
    try:
        with filesystem.open(draft, "wb") as file:
            yield file
        filesystem.mv(draft, path)
    except BaseException:
        with suppress(Exception):
            filesystem.rm(draft)
        raise


def _hold_back(url: str) -> Any:
    """The file system in a transaction: on an instance of our own, since others write through the shared one."""
    filesystem, _ = open_filesystem(url, skip_instance_cache=True)
    filesystem.start_transaction()
    return filesystem


def _can_discard(filesystem: Any, draft: str) -> bool:
    """Whether files of the store bring a ``commit`` of their own; asked of a name that nobody reads."""
    plain = importlib.import_module("fsspec.spec").AbstractBufferedFile
    probe = filesystem.open(draft, "wb")
    kind = type(probe)
    if getattr(kind, "commit", plain.commit) is not plain.commit and hasattr(kind, "discard"):
        _discard(probe)
        return True
    probe.close()
    with suppress(FileNotFoundError):
        filesystem.rm(draft)
    return False
