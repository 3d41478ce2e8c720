"""Opening a sharded checkpoint, and reading from it what this process needs. No rank waits for another here."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fabric_core.checkpoint.lazy import in_parallel
from fabric_core.checkpoint.paths import is_remote
from fabric_core.checkpoint.sharded.boxes import Box, local_part, overlap, part_of, relative, volume
from fabric_core.checkpoint.sharded.folder import Folder, LocalFolder, RemoteFolder
from fabric_core.checkpoint.sharded.index import Index, Place, TensorInfo, read_index
from fabric_core.checkpoint.sharded.layout import EXTRAS, MANIFEST, METADATA, find_folder
from fabric_core.checkpoint.sharded.manifest import Manifest, check_sizes, manifest_of
from fabric_core.checkpoint.sharded.stored import read_box
from fabric_core.errors import CheckpointError, CheckpointKeyError, UnsafeCheckpointError, UsageError

if TYPE_CHECKING:
    from fabric_core.types import Path

__all__ = ["ShardedCheckpoint", "TensorInfo", "open_folder", "open_sharded"]

_REQUESTS: Final = 8  # that a store answers at the same time
_SPLIT: Final = 64 * 2**20  # bytes; larger reads are shared between threads


@contextmanager
def open_sharded(path: Path, weights_only: bool | None = None) -> Iterator[ShardedCheckpoint]:
    """A sharded checkpoint, opened for reading. Each process opens it on its own, in any number, at any time.

    The index is read, and the files' sizes are compared with the manifest if there is one; no tensor is read yet.

    Args:
        path: the folder or URL; what Fabric, Lightning or ``torch.distributed.checkpoint`` wrote.
        weights_only: ``False`` lets the checkpoint's python values run code while they are loaded.

    Raises:
        FileNotFoundError: no sharded checkpoint is there.
        CheckpointError: files are missing or cut short (the message lists all), or damaged.
        UnsafeCheckpointError: opening it safely is impossible.
    """
    safe = weights_only is not False
    with open_folder(path) as folder:
        manifest = _sound_manifest(folder, path)
        file = METADATA if manifest is None else manifest.name(METADATA)
        index = read_index(folder.read_all(file), f"{folder.name}/{file}", safe=safe)
        yield ShardedCheckpoint(path, folder, index, manifest, safe)


def _sound_manifest(folder: Folder, path: Path) -> Manifest | None:
    """The manifest, whose files are all there; ``None`` if there is none."""
    manifest = manifest_of(folder)
    while manifest is not None and (problems := check_sizes(folder, manifest)):
        # In a store, another save may have replaced the checkpoint between two looks.
        before, manifest = manifest, manifest_of(folder)
        if manifest == before:
            raise CheckpointError(f"The checkpoint {os.fspath(path)!r} is damaged: {'; '.join(problems)}.")
    return manifest


@contextmanager
def open_folder(path: Path) -> Iterator[Folder]:
    """The files of the sharded checkpoint at ``path``. ``FileNotFoundError`` if none is there."""
    folder: Folder
    if is_remote(path):
        folder, wanted = RemoteFolder(path), {METADATA, MANIFEST}
    else:
        local = find_folder(path)
        if local is None:
            raise FileNotFoundError(f"There is no sharded checkpoint at {os.fspath(path)!r} (from {os.getcwd()!r}).")
        folder, wanted = LocalFolder(local), {METADATA}
    try:
        if not wanted & folder.sizes().keys():
            raise FileNotFoundError(f"{os.fspath(path)!r} holds no sharded checkpoint: it has no {METADATA!r}.")
        yield folder
    finally:
        folder.close()


@dataclass(frozen=True)
class _Read:
    """One piece of work: a box of a stored chunk, and the memory it belongs into."""

    place: Place
    box: Box
    destination: Tensor


class ShardedCheckpoint:
    """What a sharded checkpoint holds, and how to get at it.

    Attributes:
        path: what was opened.
        tensors: shape and dtype by flattened key, as ``model.layer.weight``.
        objects: the flattened keys of stored python values, as ``optimizer.param_groups.0.lr``.
        places: flattened key to the path of keys in the nested state, as ``("model", "layer.weight")``.
        manifest: ``None`` if something else than Fabric wrote the checkpoint.
    """

    def __init__(self, path: Path, folder: Folder, index: Index, manifest: Manifest | None, safe: bool) -> None:
        self.path = path
        self.tensors = index.tensors
        self.objects = frozenset(index.objects)
        self.places = index.places
        self.manifest = manifest
        self._folder, self._index, self._safe = folder, index, safe

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What is no module and no optimizer, ``{}`` if there is nothing. Read when first asked for, on the CPU.

        ``UnsafeCheckpointError`` if it holds more than plain values and tensors, unless ``weights_only=False``.
        """
        content = self.read_extras()
        if content is None:
            return {}
        extras: dict[str, Any] = self._load(content, f"{os.fspath(self.path)}/{EXTRAS}")
        return extras

    def read_extras(self) -> bytes | None:
        """The file that ``extras`` are in, as it is; ``None`` if the checkpoint has none."""
        name = EXTRAS if self.manifest is None else self.manifest.name(EXTRAS)
        try:
            return self._folder.read_all(name)
        except FileNotFoundError as error:
            if self.manifest is None or name not in self.manifest.files:
                return None
            raise CheckpointError(
                f"{os.path.join(self._folder.name, name)!r} is gone: another save has replaced the checkpoint while it "
                "was read, or the file was removed. Load again."
            ) from error

    @property
    def file_names(self) -> list[str]:
        """The names of the files that tensors and python values are stored in."""
        chunks = (chunk.place.file for chunks in self._index.chunks.values() for chunk in chunks)
        return sorted({*chunks, *(place.file for place in self._index.objects.values())})

    def read_object(self, key: str) -> Any:
        """The stored python value of a flattened key.

        ``CheckpointKeyError`` if there is none; ``UnsafeCheckpointError`` if it holds more than plain values and
        tensors, unless ``weights_only=False``.
        """
        place = self._index.objects.get(key)
        if place is None:
            raise CheckpointKeyError(f"{os.fspath(self.path)!r} holds no python value under {key!r}.")
        content = bytearray(place.length)
        self._folder.read_into(place.file, place.start, memoryview(content))
        return self._load(content, f"{key!r} in {os.fspath(self.path)!r}")

    def read(self, wanted: Mapping[str, Tensor]) -> None:
        """Fill tensors, in place: whole ones whole, of DTensors the part that this process holds, however they are cut.

        Other dtypes and devices are converted. No rank waits for another; memory beyond the tensors is a few small
        buffers for each thread, and one stored chunk where it is no plain tensor.

        Raises:
            CheckpointKeyError: keys are not in the checkpoint; the message lists all of them. Nothing was read.
            CheckpointError: shapes differ, all listed, or the file is damaged.
            UsageError: a tensor is on the meta device.
        """
        self._check(wanted)
        work: list[_Read] = []
        for key, tensor in wanted.items():
            work.extend(self._reads(key, tensor))
        work.sort(key=lambda item: (item.place.file, item.place.start))
        self._in_parallel(lambda item: read_box(self._folder, item.place, item.box, item.destination), work)

    def _check(self, wanted: Mapping[str, Tensor]) -> None:
        missing = [key for key in wanted if key not in self.tensors]
        shapes = [
            f"{key} has shape {tuple(self.tensors[key].shape)} there and {tuple(tensor.shape)} here"
            for key, tensor in wanted.items()
            if key in self.tensors and self.tensors[key].shape != tensor.shape
        ]
        problems = ([f"it has no tensors {', '.join(map(repr, missing))}"] if missing else []) + shapes
        if problems:
            kind = CheckpointKeyError if missing else CheckpointError
            raise kind(f"The checkpoint {os.fspath(self.path)!r} does not fit: {'; '.join(problems)}.")
        without_memory = [key for key, tensor in wanted.items() if tensor.is_meta]
        if without_memory:
            raise UsageError(
                f"Tensors on the meta device have no memory to read into: {', '.join(without_memory)}. Give them some "
                "with torch.empty_like(tensor, device=...) or module.to_empty(device=...)."
            )

    def _reads(self, key: str, tensor: Tensor) -> Iterator[_Read]:
        local, own = local_part(tensor)
        covered = 0
        for chunk in self._index.chunks[key]:
            common = overlap(own, Box(chunk.offsets, chunk.sizes))
            if common is None:
                continue
            covered += volume(common.sizes)
            yield from _split(
                chunk.place, relative(common, chunk.offsets), part_of(local, relative(common, own.offsets))
            )
        if covered < volume(own.sizes):
            raise CheckpointError(
                f"The checkpoint {os.fspath(self.path)!r} is damaged: {key} is not stored completely, "
                f"{volume(own.sizes) - covered} elements of what is asked for are nowhere."
            )

    def _in_parallel(self, action: Callable[[_Read], None], work: Sequence[_Read]) -> None:
        if not self._folder.remote or len(work) < 2:
            in_parallel(action, work, sum(item.destination.nbytes for item in work))
            return
        with ThreadPoolExecutor(min(_REQUESTS, len(work)), thread_name_prefix="checkpoint-reader") as pool:
            for _ in pool.map(action, work):
                pass

    def _load(self, content: bytes | bytearray, name: str) -> Any:
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=self._safe)
        except MemoryError:
            raise
        except Exception as error:
            refused = _refused_names(content) if self._safe and isinstance(error, pickle.UnpicklingError) else []
            if not refused:
                raise CheckpointError(f"{name} cannot be read, it may be damaged: {error}") from error
            raise UnsafeCheckpointError(
                f"{name} was NOT loaded: it holds {', '.join(refused)}, and building these objects runs code.\n"
                "Whoever wrote the file decides what that code does; it can do anything that you can do on this "
                "machine.\nIf you know these names and trust them: torch.serialization.add_safe_globals([...]), then "
                "load again.\nIf you trust the origin of the whole checkpoint: pass weights_only=False."
            ) from error


def _split(place: Place, box: Box, destination: Tensor) -> Iterator[_Read]:
    """The work, in pieces that several threads can share."""
    pieces = min(-(-destination.nbytes // _SPLIT), destination.shape[0]) if destination.dim() else 1
    if pieces < 2:
        yield _Read(place, box, destination)
        return
    rows = -(-destination.shape[0] // pieces)
    for first in range(0, destination.shape[0], rows):
        count = min(rows, destination.shape[0] - first)
        part = Box((box.offsets[0] + first, *box.offsets[1:]), (count, *box.sizes[1:]))
        yield _Read(place, part, destination.narrow(0, first, count))


def _refused_names(content: bytes | bytearray) -> list[str]:
    """What safe loading stumbles over; empty if that is not the problem or cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except Exception:  # only for a message: the real error is on its way
        return []
