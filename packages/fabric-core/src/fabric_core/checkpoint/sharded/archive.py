"""Writing one tensor as ``torch.save`` does: a zip archive without compression, its data at a multiple of 64 bytes.

``torch.save`` itself would do, except that it looks at all bytes once more for their checksum, and keeps that to
itself. What the archive says of the tensor is taken from torch, from the way it pickles an empty one of that dtype.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from functools import lru_cache
from typing import IO, Any, Final, cast

import torch
from torch import Tensor

from fabric_core.checkpoint.lazy import is_dense, is_plain_tensor
from fabric_core.checkpoint.sharded.stored import bytes_at
from fabric_core.checkpoint.sharded.summed import SummedFile

_ALIGNMENT: Final = 64
_LIMIT: Final = 2**32 - 1  # from here on, zip needs its fields for large numbers
_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_LARGE_END: Final = struct.Struct("<4sQ2H2I4Q")
_LARGE_END_AT: Final = struct.Struct("<4sIQI")
_END: Final = struct.Struct("<4s4H2IH")
_SUM_FOLLOWS: Final = 8  # flag: size and checksum come after the data
_DATE: Final = 0x21  # 1 January 1980; the time of saving is not stored


def write_tensor(tensor: Tensor, file: SummedFile) -> None:
    """Add what ``torch.load`` reads as ``tensor``. Without a copy if it lies on the CPU in one piece of memory."""
    tensor = tensor.detach().cpu()
    if not is_plain_tensor(tensor):
        torch.save(tensor.clone(), cast("IO[bytes]", file))
        return
    if not is_dense(tensor):
        tensor = tensor.contiguous()
    archive = _Archive(file)
    archive.add("data.pkl", memoryview(_structure(tensor.dtype, tuple(tensor.shape), tensor.stride())))
    archive.add("byteorder", memoryview(sys.byteorder.encode()))
    archive.add("version", memoryview(b"3\n"))
    archive.add("data/0", bytes_at(tensor.data_ptr(), tensor.nbytes))  # last, so that only the end lies far off
    archive.finish()


class _Archive:
    """A zip archive within a file."""

    def __init__(self, file: SummedFile) -> None:
        self._file, self._start = file, file.tell()
        self._contents = bytearray()
        self._count = 0

    def add(self, name: str, content: memoryview) -> None:
        """Add a record; no record may begin beyond 4 GB."""
        encoded, size, start = f"archive/{name}".encode(), len(content), self._position()
        large = size >= _LIMIT
        version, shown = (45, _LIMIT) if large else (20, size)
        extra = struct.pack("<2H2Q", 1, 16, 0, 0) if large else b""
        padding = -(start + _LOCAL.size + len(encoded) + len(extra) + 4) % _ALIGNMENT
        local_extra = extra + b"FB" + struct.pack("<H", padding) + bytes(padding)
        fields = (version, _SUM_FOLLOWS, 0, 0, _DATE, 0, _LIMIT if large else 0, _LIMIT if large else 0)
        self._file.write(_LOCAL.pack(b"PK\3\4", *fields, len(encoded), len(local_extra)) + encoded + local_extra)
        checksum = self._file.write_part(content)
        self._file.write(struct.pack("<4sI2Q" if large else "<4s3I", b"PK\7\b", checksum, size, size))
        extra = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
        described = (version, version, _SUM_FOLLOWS, 0, 0, _DATE, checksum, shown, shown)
        self._contents += _CENTRAL.pack(b"PK\1\2", *described, len(encoded), len(extra), 0, 0, 0, 0, start)
        self._contents += encoded + extra
        self._count += 1

    def finish(self) -> None:
        """Add the table of contents."""
        start, count, size = self._position(), self._count, len(self._contents)
        self._file.write(self._contents)
        if start >= _LIMIT:
            end = self._position()
            self._file.write(_LARGE_END.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
            self._file.write(_LARGE_END_AT.pack(b"PK\6\7", 0, end, 1))
        self._file.write(_END.pack(b"PK\5\6", 0, 0, count, count, size, min(start, _LIMIT), 0))

    def _position(self) -> int:
        return self._file.tell() - self._start


@lru_cache(maxsize=1024)
def _structure(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """What torch pickles for a tensor that has its storage for itself."""
    rebuild, (storage, _, _, _, *rest) = torch.empty(0, dtype=dtype, device="cpu").__reduce_ex__(2)
    buffer = io.BytesIO()
    pickler = _StructurePickler(buffer, protocol=2)  # the one that safe loading reads
    elements = torch.Size(shape).numel()
    pickler.size = elements * (1 if isinstance(storage, torch.storage.TypedStorage) else dtype.itemsize)
    pickler.dump(_Call(rebuild, (storage, 0, shape, strides, *rest)))
    return buffer.getvalue()


class _Call:
    """Is pickled as the call of a function."""

    def __init__(self, function: Any, args: tuple[Any, ...]) -> None:
        self._reduced = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._reduced


class _StructurePickler(pickle.Pickler):
    """Names the only storage there is, of ``size`` elements, in torch's way."""

    size = 0

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, "0", "cpu", self.size
        if isinstance(obj, torch.storage.TypedStorage):
            return "storage", getattr(torch, obj._pickle_storage_type()), "0", "cpu", self.size
        return None
