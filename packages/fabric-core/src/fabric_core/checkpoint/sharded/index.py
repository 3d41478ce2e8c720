"""``.metadata``, read without running code from it: which piece of which tensor lies where.

The file is a pickle of DCP's metadata classes, which have changed their fields from one torch to the next, and moved.
Here every such class is a record of attributes and nothing else: whatever torch wrote it, whatever torch reads it, and
no name in the file leads to code.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

import torch

from fabric_core.errors import CheckpointError, UnsafeCheckpointError

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_OLD: Final = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS: Final = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_OLD, "TensorProperties"),
        (_OLD, "MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PurePosixPath", "PureWindowsPath")),
    }
)


@dataclass(frozen=True)
class Place:
    """Where bytes lie: ``length`` bytes of ``file`` from byte ``start`` on."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor: the position of its first element in the tensor, its extent, and its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor as a whole."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Index:
    """What a sharded checkpoint holds, by flattened key.

    Attributes:
        tensors: shape and dtype.
        chunks: the boxes of each tensor that hold elements.
        objects: where the pickled python values are.
        places: the path of keys in the nested state that was saved. A checkpoint that has no such record was saved
            from a flat dict, so that the flattened key is the only step.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    chunks: dict[str, list[StoredChunk]] = field(default_factory=dict)
    objects: dict[str, Place] = field(default_factory=dict)
    places: dict[str, tuple[str | int, ...]] = field(default_factory=dict)


def read_index(content: bytes, name: str, *, safe: bool = True) -> Index:
    """The index from the content of the file ``name``, which is for messages.

    Raises:
        UnsafeCheckpointError: the file names more than DCP's metadata classes, and ``safe`` is true.
        CheckpointError: the file is damaged.
    """
    try:
        metadata = _Unpickler(content, name, safe).load()
        return _index(metadata)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name!r} cannot be read, it may be damaged: {error}") from error


class _Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"{cls.__name__} cannot be changed")


class _Record(metaclass=_Sealed):
    """The attributes of an object in the file. Its methods are these two."""

    def __init__(self, *args: object) -> None:
        self.__dict__["args"] = args

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Key(_Record):
    """``MetadataIndex``: what the places of bytes are listed under."""

    offset: Any = None  # torch leaves it out of the file if there is none

    def _identity(self) -> tuple[object, object]:
        return self.__dict__.get("fqn"), self.offset

    def __hash__(self) -> int:
        return hash(self._identity())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._identity() == other._identity()


def _member(owner: object, name: object) -> _Record:
    """In place of ``getattr``, by which Python 3.11.0 to 3.11.3 pickle a member of an enumeration: looks up nothing."""
    if owner is not _Record:
        raise TypeError(f"an attribute of {owner!r} is asked for")
    return _Record(name)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, name: str, safe: bool) -> None:
        super().__init__(io.BytesIO(content))
        self._name, self._safe = name, safe

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == (_METADATA, "MetadataIndex"):
            return _Key
        if name == "getattr" and module in ("builtins", "__builtin__"):
            return _member
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # Not getattr, which makes torch import modules whose name is asked for.
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype | torch.layout):
            return found
        if self._safe:
            raise UnsafeCheckpointError(
                f"{self._name!r} was NOT opened: it names {module}.{name}, which no index of a sharded checkpoint "
                "needs, and building such an object runs code.\nWhoever wrote the file decides what that code does; "
                "it can do anything that you can do on this machine.\nIf you trust the origin of the whole checkpoint: "
                "pass weights_only=False."
            )
        return super().find_class(module, name)


def _index(metadata: Any) -> Index:
    index = Index()
    places = {
        (str(key.fqn), None if key.offset is None else tuple(key.offset)): info
        for key, info in metadata.storage_data.items()
    }
    for key, entry in metadata.state_dict_metadata.items():
        if "properties" not in entry.__dict__:
            index.objects[key] = _place(places[key, None])
            continue
        index.tensors[key] = TensorInfo(torch.Size(entry.size), _dtype(entry.properties))
        index.chunks[key] = list(_chunks(key, entry.chunks, places))
    paths = metadata.__dict__.get("planner_data")
    paths = paths if isinstance(paths, Mapping) else {}
    for key in (*index.tensors, *index.objects):
        index.places[key] = tuple(paths.get(key, (key,)))
    return index


def _chunks(key: str, entries: Any, places: dict[Any, Any]) -> Iterator[StoredChunk]:
    for entry in entries:
        offsets, sizes = tuple(entry.offsets), tuple(entry.sizes)
        if 0 not in sizes:
            yield StoredChunk(offsets, sizes, _place(places[key, offsets]))


def _dtype(properties: Any) -> torch.dtype:
    state = properties.__dict__.get("state")
    dtype = state[0] if state is not None else properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype")
    return dtype


def _place(info: Any) -> Place:
    file = str(info.relative_path)
    parts = PurePosixPath(file.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].endswith(("/", ":")):
        raise CheckpointError(f"The index of the checkpoint points to {file!r}, which is outside of its folder.")
    if info.__dict__.get("transform_descriptors"):
        raise CheckpointError(
            f"{file!r} was written through {list(info.transform_descriptors)}, stream transforms of DCP. Read this "
            "checkpoint with torch.distributed.checkpoint and the same extensions."
        )
    return Place(file, int(info.offset), int(info.length))
