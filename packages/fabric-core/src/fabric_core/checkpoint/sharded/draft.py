"""The folder that is being written, and how it becomes the checkpoint.

The draft is a folder beside the target, ``.NAME.UNIQUE.partial``. One file in it, ``manifest.json``, exists from the
start, empty, and every process that writes holds a lock on it, which ends with the process: so the next save of the
same target can tell a draft that nobody works on, and removes it. ``publication`` says how the draft becomes the
checkpoint.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol, cast

from fabric_core.checkpoint.durable import folder_to_disk, lock, new_name, to_disk
from fabric_core.checkpoint.paths import is_http, is_remote, resolve
from fabric_core.checkpoint.sharded.layout import EXTRAS, SHARDED, FolderLayout
from fabric_core.checkpoint.sharded.publication import (
    discard,
    finish,
    layout_in,
    put_in_place,
    recover,
    remove_abandoned,
)
from fabric_core.checkpoint.sharded.summed import SummedFile
from fabric_core.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric_core.checkpoint.sharded.manifest import Manifest
    from fabric_core.types import Path

_PATIENCE: Final = 5.0  # seconds; for how long a network file system may hide a folder that another machine has made
_SHOWN: Final = 5  # names in a message


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


def replace_by_file(path: Path, write: Callable[[str], None]) -> None:
    """Put a single file in the place of the local folder of a checkpoint, which stays until the file is there.

    Args:
        path: the folder, of core's layout or a plugin's. One process calls this.
        write: writes the file to the path that it is called with, and returns when its bytes are on disk.

    Raises:
        IsADirectoryError: the folder also holds other things, which the message names. Nothing was written.
        OSError: as the system says.
    """
    _refuse_others(os.path.realpath(resolve(path)))
    draft = LocalDraft.begin(path)
    try:
        write(draft.place_for_file())
        draft.publish_file()
    except BaseException:
        draft.discard()
        raise
    finally:
        draft.close()


class LocalDraft:
    """A draft on the local file system, or one that is mounted on every machine that takes part.

    Attributes:
        folder: where to write.
    """

    generation = ""

    def __init__(self, folder: str, held: BinaryIO, target: str = "", layout: FolderLayout = SHARDED) -> None:
        self.address = (folder, "")
        self.folder, self._target, self._held, self._layout = folder, target, held, layout
        self._published = False

    @classmethod
    def begin(cls, path: Path, layout: FolderLayout = SHARDED) -> LocalDraft:
        """The draft of ``path``, as ``begin_draft`` says."""
        target = os.path.realpath(resolve(path))
        _refuse(target, layout)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        recover(target, layout)
        remove_abandoned(target, layout)
        while True:
            folder = new_name(target)
            os.mkdir(folder)
            with suppress(FileNotFoundError):  # another save took the empty folder for abandoned
                return cls(folder, _hold(os.path.join(folder, layout.held), "x+b"), target, layout)

    @classmethod
    def join(cls, folder: str, layout: FolderLayout = SHARDED) -> LocalDraft:
        """The draft in ``folder``, which another process has begun."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return cls(folder, _hold(os.path.join(folder, layout.held), "r+b"), layout=layout)
            except FileNotFoundError as error:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"This machine does not see {folder!r}, which rank 0 has made. A checkpoint of several "
                        "processes is written by all machines into one folder: pass a path on a file system that they "
                        "share."
                    ) from error
            with suppress(OSError):
                os.listdir(os.path.dirname(folder))  # makes a network file system look again
            time.sleep(0.05)

    def create(self, name: str) -> SummedFile:
        """A file of the draft; its bytes are on disk when it was closed without an error."""
        file = open(os.path.join(self.folder, name), "xb", buffering=0)  # noqa: SIM115 - closed by what is returned
        return SummedFile(file, lambda: to_disk(file.fileno()))

    def publish(self, manifest: Manifest) -> None:
        """Make the draft the checkpoint; rank 0 calls it when all files of all ranks are closed."""
        self.complete(manifest.dumps())

    def complete(self, content: bytes) -> None:
        """Make the draft the checkpoint, with ``content`` in the file that was held. As ``publish``."""
        self._held.write(content)
        self._held.flush()
        to_disk(self._held.fileno())
        with suppress(FileNotFoundError):
            os.chmod(self.folder, _folder_mode(self._target, self.folder))
        folder_to_disk(self.folder)
        if sys.platform == "win32":
            self._held.close()  # a folder with open files cannot be renamed there
        old = put_in_place(self.folder, self._target)
        self._published = True
        finish(self._target, old, self._layout)

    def place_for_file(self) -> str:
        """Where to write the single file that ``publish_file`` makes the checkpoint. Nobody else calls the draft then.

        It has the target's name, in a folder that goes with the draft, whatever else the writer puts there.
        """
        folder = os.path.join(self.folder, EXTRAS)  # a name that ``remove`` knows
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, os.path.basename(self._target))

    def publish_file(self) -> None:
        """Make the single file the checkpoint, in the place of a folder that holds nothing else than one."""
        _refuse_others(self._target)  # again: somebody may have put a file there meanwhile
        place = self.place_for_file()
        old = put_in_place(place, self._target)
        if old == place:  # the folder is in the draft now; beside it, it is known for what it was
            old = new_name(self._target)
            os.rename(place, old)
        self._published = True
        finish(self._target, old, self._layout)
        self._held.close()
        discard(self.folder)

    def discard(self) -> None:
        """Remove the draft, unless it was published."""
        if not self._published:
            self._held.close()
            discard(self.folder)

    def close(self) -> None:
        """Let go of the draft."""
        self._held.close()


def _refuse(target: str, layout: FolderLayout) -> None:
    """``OSError`` if what is at the target must not be replaced by a folder of this layout."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        _refuse_folder(target, layout)
    elif not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "Neither a checkpoint nor a file, and cannot be replaced by one", target)
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "The checkpoint to replace is write-protected", target)


def _refuse_folder(target: str, layout: FolderLayout) -> None:
    old, names = layout_in(target, layout), os.listdir(target)
    if old is None and names:
        raise IsADirectoryError(
            errno.EISDIR,
            "The folder holds other things than a checkpoint, and would be replaced. Choose another name, or empty it",
            target,
        )
    clashing = [name for name in names if old is not None and not old.is_part(name) and layout.is_part(name)]
    if clashing:
        raise _also_holds(target, clashing, "the new checkpoint has files of these names")


def _refuse_others(target: str) -> None:
    """``IsADirectoryError`` if the folder holds what is no part of a checkpoint: a file can take none of it over."""
    layout = layout_in(target) or SHARDED
    others = [name for name in os.listdir(target) if not layout.is_part(name)]
    if others:
        raise _also_holds(target, others, "one file would replace all of it")


def _also_holds(target: str, names: list[str], why: str) -> IsADirectoryError:
    names = sorted(names)
    shown = ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")
    return IsADirectoryError(
        errno.EISDIR,
        f"The folder of the checkpoint also holds {shown}, and {why}. Choose another name, or move them",
        target,
    )


def _hold(path: str, mode: str) -> BinaryIO:
    file = cast("BinaryIO", open(path, mode))  # noqa: SIM115 - held until the draft is closed
    lock(file.fileno(), shared=True)
    if os.path.exists(path):
        return file
    file.close()
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _folder_mode(target: str, otherwise: str) -> int:
    """The permissions for the new folder: those of the folder that it replaces."""
    found = os.stat(target).st_mode
    return stat.S_IMODE(found if stat.S_ISDIR(found) else os.stat(otherwise).st_mode)
