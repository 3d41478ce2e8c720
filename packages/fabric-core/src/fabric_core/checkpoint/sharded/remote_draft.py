"""A checkpoint that is being written to a store, where nothing can be renamed in one step.

Every save gives its files names of its own, so that they lie beside those of the save before. One small object then
makes the new save the checkpoint: ``manifest.json``, which names its files. After that the copies are made that plain
readers look for, ``.metadata`` and ``meta.pt``, and what the manifest does not name is deleted. A save that died
anywhere before the manifest was never there; one that died after it is complete, and the next save tidies up.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from fabric_core.checkpoint.remote import publish_remote
from fabric_core.checkpoint.sharded.folder import RemoteFolder
from fabric_core.checkpoint.sharded.layout import EXTRAS, MANIFEST, METADATA, is_part
from fabric_core.checkpoint.sharded.manifest import Manifest, check_sizes, manifest_of, with_generation
from fabric_core.checkpoint.sharded.summed import SummedFile
from fabric_core.errors import CheckpointError
from fabric_core.rank_zero import rank_zero_warn

_FIXED: Final = (MANIFEST, METADATA, EXTRAS)


class RemoteDraft:
    """A draft of the checkpoint at ``url``, whose files carry the name ``generation``."""

    def __init__(self, url: str, generation: str) -> None:
        self.address = (url, generation)
        self.generation = generation
        self._url, self._folder = url.rstrip("/"), RemoteFolder(url)
        self._published = False

    @classmethod
    def begin(cls, url: str) -> RemoteDraft:
        """A new draft; rank 0 calls it.

        Raises:
            IsADirectoryError: the folder holds other things than a checkpoint.
            FileExistsError: a file is there, and the store cannot have a folder of the same name beside it.
        """
        draft = cls(url, secrets.token_hex(8))
        filesystem, inside = draft._folder.filesystem, draft._folder.inside
        if not {METADATA, MANIFEST} & draft._folder.sizes().keys():
            names = (path.removeprefix(inside).strip("/") for path in filesystem.find(inside))
            if any(name and not is_part(name) for name in names):
                raise IsADirectoryError(
                    errno.EISDIR,
                    "The folder holds other things than a checkpoint. Choose another name, or empty it",
                    url,
                )
        try:
            filesystem.makedirs(inside, exist_ok=True)
            if filesystem.isfile(inside):  # can there be both? The draft's first file tells
                filesystem.pipe_file(draft._folder.path(with_generation(EXTRAS, draft.generation)), b"")
        except (FileExistsError, NotADirectoryError) as error:
            raise FileExistsError(
                errno.EEXIST,
                "A file is there, and this store can have no folder of its name. Remove the file first",
                url,
            ) from error
        return draft

    def create(self, name: str) -> SummedFile:
        """An object of the draft; it is stored when the file was closed without an error."""
        return SummedFile(_Upload(self._folder.filesystem.open(self._folder.path(name), "wb")))

    def publish(self, manifest: Manifest) -> None:
        """Make the draft the checkpoint; rank 0 calls it when all files of all ranks are closed."""
        if problems := check_sizes(self._folder, manifest):
            raise CheckpointError(f"The store did not keep what was written to {self._url!r}: {'; '.join(problems)}.")
        with publish_remote(f"{self._url}/{MANIFEST}") as file:
            file.write(manifest.dumps())
        self._published = True
        try:
            self._copy_for_plain_readers(manifest)
        except Exception as error:
            rank_zero_warn(
                f"The checkpoint {self._url!r} is complete, but readers other than Fabric still see the one before: "
                f"{METADATA} and {EXTRAS} could not be written ({error})."
            )
            return
        with suppress(Exception):  # the next save does it
            self._tidy_up(manifest)

    def discard(self) -> None:
        """Delete the draft's objects, unless it was published.

        An error while the manifest was written does not tell whether it is there: the store's answer may be lost. So
        it is read, and if that fails, all files stay for the next save to delete.
        """
        if self._published:
            return
        with suppress(Exception):  # the error that led here says more
            manifest = manifest_of(self._folder)
            if manifest is None or manifest.generation != self.generation:
                self._delete(name for name in self._folder.sizes() if f".{self.generation}" in name)

    def close(self) -> None:
        """Nothing is held."""

    def _copy_for_plain_readers(self, manifest: Manifest) -> None:
        for name in (EXTRAS, METADATA):  # plain readers begin with the latter
            content = self._folder.read_all(manifest.name(name))
            self._folder.filesystem.pipe_file(self._folder.path(name), content)

    def _tidy_up(self, manifest: Manifest) -> None:
        """Delete what other saves have left, and a single file of the same name."""
        names = self._folder.sizes().keys() - manifest.files.keys() - set(_FIXED)
        self._delete(name for name in names if is_part(name))
        filesystem, inside = self._folder.filesystem, self._folder.inside
        if filesystem.isfile(inside):
            filesystem.rm_file(inside)

    def _delete(self, names: Iterable[str]) -> None:
        paths = [self._folder.path(name) for name in names]
        if paths:
            self._folder.filesystem.rm(paths)


class _Upload:
    """A file of a store. Some stores' files take nothing but ``bytes``."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any, /) -> int:
        self._file.write(bytes(data))
        return len(data)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        """Give up what was written; a file that is merely dropped would upload it when it is deleted."""
        if hasattr(self._file, "discard"):
            self._file.discard()
        with suppress(AttributeError):  # files in memory compute it
            self._file.closed = True
