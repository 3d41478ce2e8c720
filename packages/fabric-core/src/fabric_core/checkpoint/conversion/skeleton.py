"""The structure of a ``torch.save`` file, with nothing in it built: no tensor is read, no class is looked up.

Whatever the pickle names becomes a stand-in that knows its name and takes everything that is done to it. So a file can
be shown that safe loading refuses, and one that is larger than memory.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import torch

from fabric_core.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class TensorOutline:
    """What a file says of a tensor.

    Attributes:
        shape: its shape.
        dtype: its dtype; ``None`` if it is not known here.
        storage: tensors of one file with the same storage share memory.
        view: what part of the storage it shows: first element and strides.
    """

    shape: torch.Size
    dtype: torch.dtype | None
    storage: str
    view: tuple[Any, ...]


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None
    key: str


class StandIn:
    """An object of a class, or the result of a function, that was named in the file and not looked for.

    Attributes:
        kind: the name, as ``argparse.Namespace``.
    """

    kind = ""

    def __new__(cls, *_: object, **__: object) -> StandIn:
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> StandIn:
        """The same, whatever it is called with."""
        return self

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: object) -> None:
        """What building a list asks for."""

    def extend(self, items: object) -> None:
        """What building a list asks for."""

    def add(self, item: object) -> None:
        """What building a set asks for."""


def read_skeleton(file: BinaryIO, name: str) -> Any:
    """The structure in an open file that ``torch.save`` wrote in today's format; ``name`` is for messages.

    Plain containers, numbers and texts are as they were saved; tensors are ``TensorOutline``, the rest ``StandIn``.

    Raises:
        CheckpointError: the file is damaged, or in a format of before torch 1.6.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            record = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
            if record is None:
                raise CheckpointError(f"{name!r} is a zip archive, but no checkpoint.")
            if record.CRC == 0:  # written without checksums, as torch can be told to: nothing to compare with
                record.CRC = None  # type: ignore[assignment]
            return _Unpickler(io.BytesIO(archive.read(record))).load()
    except (CheckpointError, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{name!r} is no checkpoint file, or is damaged, or is in the format of before torch 1.6: {error}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{name!r} cannot be read, it may be damaged: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Nothing that the file could do harm with."""
        full = f"{module}.{name}"
        if full in _REBUILD:
            rebuild = _REBUILD[full]
            return lambda *arguments: rebuild(*arguments)  # a new one each time: the file can set attributes of it
        if full in _TYPES:
            return _TYPES[full]
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        return type(name, (StandIn,), {"kind": _PLAIN_NAMES.get(full, full.removeprefix("__builtin__."))})

    def persistent_load(self, pid: Any) -> Any:
        """What a tensor's memory is, not the memory itself."""
        _, kind, key, *_ = pid
        return _Storage(_dtype_of_storage(getattr(kind, "kind", "")), str(key))


def _dtype_of_storage(kind: str) -> torch.dtype | None:
    name = kind.rpartition(".")[2].removesuffix("Storage")
    return _DTYPES.get(name)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorOutline:
    return TensorOutline(torch.Size(size), storage.dtype, storage.key, (offset, tuple(stride)))


def _tensor_with_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorOutline:
    return TensorOutline(torch.Size(size), rest[2], storage.key, (offset, tuple(stride)))


def _parameter(data: Any, *_: Any) -> Any:
    return data


_DTYPES: Final[dict[str, torch.dtype]] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
}
_REBUILD: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_TYPES: Final[dict[str, type]] = {"collections.OrderedDict": OrderedDict, "torch.Size": torch.Size}
_PLAIN_NAMES: Final = {
    "_codecs.encode": "bytes",
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_qtensor": "quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensor without values",
}
"""What people call some of the names in files."""
