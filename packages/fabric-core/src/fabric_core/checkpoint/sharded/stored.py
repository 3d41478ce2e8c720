"""One stored chunk: where in the file its elements are, and how a box of them gets into a tensor's memory.

A chunk is what ``torch.save`` wrote for one tensor: a zip archive within a larger file. Its table of contents says
where the bytes are; they go from there straight to their destination, or through a small buffer where the dtype, the
device or the order in memory differ.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fabric_core.checkpoint.lazy import span
from fabric_core.checkpoint.sharded.boxes import Box as Box
from fabric_core.checkpoint.sharded.boxes import part_of
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.folder import Folder
    from fabric_core.checkpoint.sharded.index import Place

_BUFFER: Final = 16 * 2**20  # bytes that pass through a buffer at a time
_SMALL: Final = 256 * 2**10  # bytes; read whole, rather than the table of contents first
_SMALL_REMOTE: Final = 4 * 2**20
_ENDS: Final = 4096  # bytes; the table of contents is in the first and last ones
_DTYPES: Final = {  # by what torch.save calls their storages; newer dtypes are named themselves
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True)
class Elements:
    """Where a stored tensor's elements are: ``start`` is the first one's position in ``file``, in bytes."""

    file: str
    start: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@torch.no_grad()
def read_box(folder: Folder, place: Place, box: Box, destination: Tensor) -> None:
    """Fill ``destination``, of the box's shape, with a box of the chunk at ``place``; any dtype, layout and device.

    ``CheckpointError`` if the chunk is damaged.
    """
    piece = _Piece(folder, place)
    try:
        elements = _elements(piece, place)
        if elements is None:
            whole = torch.load(io.BytesIO(piece.everything()), map_location="cpu", weights_only=True)
            destination.copy_(part_of(whole, box))
            return
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{folder.name}: {place.file} is damaged at byte {place.start}: {error}") from error
    _copy(piece, elements, box, destination)


class _Piece(io.RawIOBase):
    """The bytes of one chunk as a file; its ends, or all of it if it is small, are read once."""

    def __init__(self, folder: Folder, place: Place) -> None:
        super().__init__()
        self._folder, self._place, self._position = folder, place, 0
        if place.length <= (_SMALL_REMOTE if folder.remote else _SMALL):
            self._parts = [(0, self._fetch(0, place.length))]
        else:
            last = place.length - _ENDS
            self._parts = [(0, self._fetch(0, _ENDS)), (last, self._fetch(last, _ENDS))]

    def everything(self) -> bytes:
        """All bytes of the chunk."""
        return bytes(self._fetch(0, self._place.length))

    def fill(self, start: int, view: memoryview) -> None:
        """Bring bytes to ``view``, from byte ``start`` of the chunk on."""
        if start < 0 or start + len(view) > self._place.length:
            raise CheckpointError(f"{self._folder.name}: {self._place.file} is damaged, a chunk ends too early.")
        for first, content in self._parts:
            if first <= start and start + len(view) <= first + len(content):
                view[:] = content[start - first : start - first + len(view)]
                return
        self._folder.read_into(self._place.file, self._place.start + start, view)

    def _fetch(self, start: int, length: int) -> memoryview:
        content = memoryview(bytearray(length))
        self._folder.read_into(self._place.file, self._place.start + start, content)
        return content

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._place.length - self._position)]
        self.fill(self._position, view)
        self._position += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._place.length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Rebuilt:
    """Stands for torch's functions that make a tensor of a storage; keeps what they are called with."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class _NotPlainError(Exception):
    """The chunk holds something else than a plain tensor."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        # Not getattr, which makes torch import modules whose name is asked for.
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise _NotPlainError

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _elements(piece: _Piece, place: Place) -> Elements | None:
    """Where the elements are; ``None`` if the chunk is no plain tensor of this machine's byte order."""
    with zipfile.ZipFile(piece) as archive:
        root = archive.filelist[0].filename.partition("/")[0]
        names = archive.NameToInfo
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder").decode() != sys.byteorder:
            return None
        try:
            rebuilt = _Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        except _NotPlainError:
            return None
        if not isinstance(rebuilt, _Rebuilt):
            return None
        (_, kind, key, *_), offset, sizes, strides, _, _, *rest = rebuilt.args
        dtype = rest[0] if rest and isinstance(rest[0], torch.dtype) else _DTYPES.get(kind)
        record = names.get(f"{root}/data/{key}")
        if dtype is None or record is None or record.compress_type != zipfile.ZIP_STORED:
            return None
        start = _start_of_data(piece, record.header_offset) + offset * dtype.itemsize
        return Elements(place.file, start, dtype, tuple(sizes), tuple(strides))


def _start_of_data(piece: _Piece, header: int) -> int:
    """Where a zip entry's bytes begin, its header being at byte ``header``."""
    lengths = memoryview(bytearray(4))
    piece.fill(header + 26, lengths)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return header + 30 + name + extra


def _copy(piece: _Piece, elements: Elements, box: Box, destination: Tensor) -> None:
    """Bring a box of the stored elements to ``destination``, whose shape it has."""
    width = elements.dtype.itemsize
    start = elements.start + width * sum(o * s for o, s in zip(box.offsets, elements.strides, strict=True))
    length = 1 + sum((size - 1) * s for size, s in zip(box.sizes, elements.strides, strict=True))
    if _same_order(elements, box, length, destination):
        piece.fill(start, bytes_at(destination.data_ptr(), length * width))
    elif length * width <= _BUFFER or destination.numel() == 1:
        buffer = torch.empty(length, dtype=elements.dtype, device="cpu")
        piece.fill(start, bytes_at(buffer.data_ptr(), length * width))
        destination.copy_(buffer.as_strided(box.sizes, elements.strides))
    else:
        dim = _widest(box.sizes, elements.strides)
        half = box.sizes[dim] // 2
        for first, count in ((0, half), (half, box.sizes[dim] - half)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim], sizes[dim] = offsets[dim] + first, count
            part = Box(tuple(offsets), tuple(sizes))
            _copy(piece, elements, part, destination.narrow(dim, first, count))


def _same_order(elements: Elements, box: Box, length: int, destination: Tensor) -> bool:
    """Whether the box's bytes, as they follow each other in the file, are what belongs into the memory."""
    return bool(
        destination.device.type == "cpu"
        and destination.dtype == elements.dtype
        and not (destination.is_conj() or destination.is_neg())
        and length == destination.numel() == span(destination)
        and all(
            size == 1 or stored == own
            for size, stored, own in zip(box.sizes, elements.strides, destination.stride(), strict=True)
        )
    )


def _widest(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """The dim along which a box has the farthest ends."""
    return max(range(len(sizes)), key=lambda dim: (sizes[dim] - 1) * strides[dim])


def bytes_at(address: int, length: int) -> memoryview:
    """``length`` bytes of memory."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
