"""Reading the files of a checkpoint, from a local folder or from a store."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from fabric_core.checkpoint.paths import open_filesystem
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.types import Path


class Folder(Protocol):
    """The files of one checkpoint. Several threads may read.

    Attributes:
        name: for messages.
        remote: whether each read costs a request.
    """

    name: str
    remote: bool

    def sizes(self) -> dict[str, int]:
        """Name to size in bytes."""
        ...

    def read_all(self, file: str) -> bytes:
        """A whole small file. ``FileNotFoundError`` if it is absent."""
        ...

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on. ``CheckpointError`` if there are not enough."""
        ...

    def close(self) -> None:
        """Nothing is read any more."""
        ...


class LocalFolder:
    """A folder of the local file system, the same one for as long as it is open.

    A save may put another folder in its place meanwhile. What was opened is read on, or reported as gone, so that
    pieces of two checkpoints are never mixed.
    """

    remote = False

    def __init__(self, path: str) -> None:
        self.name, self._path = path, path
        self._fd = os.open(path, os.O_RDONLY) if os.open in os.supports_dir_fd else None

    def sizes(self) -> dict[str, int]:
        """Name to size in bytes."""
        with os.scandir(self._path if self._fd is None else self._fd) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read_all(self, file: str) -> bytes:
        """A whole small file. ``FileNotFoundError`` if it is absent."""
        with open(self._open(file), "rb") as opened:
            return opened.read()

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on. ``CheckpointError`` if there are not enough."""
        try:
            fd = self._open(file)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{os.path.join(self.name, file)!r} is gone: another save has replaced the checkpoint while it was "
                "read, or the file was removed. Load again."
            ) from error
        with open(fd, "rb", buffering=0) as opened:
            opened.seek(start)
            done = 0
            while done < len(view):
                count = opened.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{os.path.join(self.name, file)!r} is shorter than its index says.")
                done += count

    def _open(self, file: str) -> int:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        if self._fd is None:
            return os.open(os.path.join(self._path, file), flags)
        return os.open(file, flags, dir_fd=self._fd)

    def close(self) -> None:
        """Nothing is read any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class RemoteFolder:
    """A folder of a store that fsspec reaches."""

    remote = True

    def __init__(self, url: Path) -> None:
        self.name = os.fspath(url)
        self.filesystem, inside = open_filesystem(url)
        self.inside = inside.rstrip("/")
        self.filesystem.invalidate_cache(self.inside)

    def path(self, file: str) -> str:
        """The path of a file inside the store."""
        return f"{self.inside}/{file}"

    def sizes(self) -> dict[str, int]:
        """Name to size in bytes."""
        self.filesystem.invalidate_cache(self.inside)
        try:
            found: dict[str, Any] = self.filesystem.find(self.inside, detail=True, maxdepth=1)
        except FileNotFoundError:
            return {}
        return {path.rpartition("/")[2]: entry["size"] for path, entry in found.items()}

    def read_all(self, file: str) -> bytes:
        """A whole small file. ``FileNotFoundError`` if it is absent."""
        return bytes(self.filesystem.cat_file(self.path(file)))

    def read_into(self, file: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on. ``CheckpointError`` if there are not enough."""
        content = b""
        with suppress(FileNotFoundError):
            content = self.filesystem.cat_file(self.path(file), start=start, end=start + len(view))
        if len(content) != len(view):
            raise CheckpointError(
                f"{self.name}/{file} is gone or shorter than its index says: another save has replaced the checkpoint "
                "while it was read, or it is damaged. Load again."
            )
        view[:] = content

    def close(self) -> None:
        """Nothing is read any more."""
