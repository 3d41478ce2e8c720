"""Writing a file that ``torch.load`` reads, tensor by tensor: no more than a piece of one tensor is in memory.

The format is that of ``torch.save``: a zip archive without compression, ``data.pkl`` with the structure in it, and
``data/N`` with the bytes of storage N, each at a multiple of 64 so that it can be mapped. What the structure says of a
tensor is taken from torch itself, from the way it pickles an empty tensor of the same dtype. The archive is written in
one go and needs no seeking, so a store that takes a stream gets one. Checksums are right.

``torch.serialization.skip_data`` could leave holes to fill in as well; it would need a file that can be read and
sought, leaves wrong checksums, and knows fake tensors only, whose import takes longer than most files.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import torch

from fabric_core.checkpoint.commit import publish
from fabric_core.checkpoint.conversion.streams import Progress, StreamedTensor, streamed
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.types import Path

_ALIGNMENT: Final = 64  # torch's
_ROOT: Final = "archive"
_SURELY_BELOW_ZIP64: Final = 2**30
_STORAGES: Final = (torch.UntypedStorage, torch.storage.TypedStorage)


def write_file(path: Path, tree: Any, progress: Progress | None = None) -> None:
    """Write ``tree`` to the file or object ``path``, complete or not at all, for ``torch.load`` to read.

    Args:
        path: where to; parent folders are made.
        tree: what ``torch.save`` takes, with ``StreamedTensor`` in the place of tensors that are not in memory.
        progress: called with the number of bytes that were just written.

    Raises:
        CheckpointError: something in ``tree`` cannot be pickled, or a tensor brings too few or too many values.
    """
    with publish(path) as file:
        write_archive(file, tree, progress)


def write_archive(file: BinaryIO, tree: Any, progress: Progress | None = None) -> None:
    """Write ``tree`` to an open file, as ``write_file`` does."""
    structure = io.BytesIO()
    pickler = _StructurePickler(structure)
    try:
        pickler.dump(tree)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(f"The checkpoint cannot be written: {error}. Store plain values.") from error
    with zipfile.ZipFile(file, "w") as archive:
        writer = _RecordWriter(file, archive)
        writer.write("data.pkl", structure.getvalue())
        writer.write(".format_version", b"1")
        writer.write(".storage_alignment", str(_ALIGNMENT).encode())
        writer.write("byteorder", sys.byteorder.encode())
        for key, source in enumerate(pickler.sources):
            writer.stream(f"data/{key}", source, progress)
        writer.write("version", b"3\n")


class _StorageOf:
    """What the structure says of a tensor's bytes: where they are, and as what."""

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity


class _StructurePickler(pickle.Pickler):
    """Pickles everything but the bytes of tensors, which it lists in ``sources`` instead."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)  # the one that safe loading reads
        self.sources: list[StreamedTensor] = []
        self._keys: dict[int, str] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Streamed tensors look like tensors; everything else is pickled as ever."""
        if not isinstance(obj, StreamedTensor):
            return NotImplemented
        rebuild, (storage, _, _, _, *rest) = torch.empty(0, dtype=obj.dtype).__reduce_ex__(2)
        typed = isinstance(storage, torch.storage.TypedStorage)
        size = obj.shape.numel() if typed else obj.nbytes
        reference = _StorageOf(("storage", _kind(storage), self._add(obj), "cpu", size))
        strides = torch.empty(obj.shape, device="meta").stride()
        return rebuild, (reference, 0, tuple(obj.shape), strides, *rest)

    def persistent_id(self, obj: Any) -> Any:
        """The tuple by which torch finds a storage; ``None`` for what is none."""
        if isinstance(obj, _StorageOf):
            return obj.identity
        return self._identity(obj) if isinstance(obj, _STORAGES) else None

    def _identity(self, obj: Any) -> tuple[Any, ...]:
        typed = isinstance(obj, torch.storage.TypedStorage)
        untyped, width = (obj._untyped_storage, obj.dtype.itemsize) if typed else (obj, 1)
        address = untyped.data_ptr()
        if address == 0 or address not in self._keys:
            content = torch.empty(0, dtype=torch.uint8).set_(untyped.cpu())
            self._keys[address] = self._add(streamed(content))
        return ("storage", _kind(obj), self._keys[address], "cpu", untyped.nbytes() // width)

    def _add(self, source: StreamedTensor) -> str:
        self.sources.append(source)
        return str(len(self.sources) - 1)


def _kind(storage: Any) -> type:
    """The class that stands for a storage in the file: those of old dtypes have names of their own."""
    if isinstance(storage, torch.UntypedStorage):
        return torch.UntypedStorage
    kind: type = getattr(torch, storage._pickle_storage_type())
    return kind


class _RecordWriter:
    """Adds records to the archive, each with its content at a multiple of the alignment."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive

    def write(self, name: str, content: bytes) -> None:
        with self._open(name, len(content)) as record:
            record.write(content)

    def stream(self, name: str, source: StreamedTensor, progress: Progress | None) -> None:
        with self._open(name, source.nbytes) as record:
            source.write_to(record, progress)

    def _open(self, name: str, size: int) -> Any:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}")
        info.file_size = size
        large = size >= _SURELY_BELOW_ZIP64
        info.extra = self._padding(info, large)
        return self._archive.open(info, "w", force_zip64=large)

    def _padding(self, info: zipfile.ZipInfo, large: bool) -> bytes:
        start = self._file.tell() + 30 + len(info.filename) + (20 if large else 0) + 4
        length = -start % _ALIGNMENT
        return b"FB" + length.to_bytes(2, "little") + bytes(length)
