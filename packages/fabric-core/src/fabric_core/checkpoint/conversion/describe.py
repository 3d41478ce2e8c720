"""What a checkpoint holds, told without reading tensors and without running anything that is in it."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.kinds import KINDS, kind_of
from fabric_core.checkpoint.conversion.skeleton import StandIn, TensorOutline, read_skeleton
from fabric_core.checkpoint.conversion.streams import StreamedTensor
from fabric_core.checkpoint.folder import nested
from fabric_core.checkpoint.foreign import ForeignFolder, find_foreign
from fabric_core.checkpoint.paths import is_remote, open_filesystem, resolve
from fabric_core.checkpoint.safetensors_io import is_safetensors, load_safetensors, open_safetensors
from fabric_core.checkpoint.sharded.layout import EXTRAS, METADATA, is_sharded
from fabric_core.checkpoint.sharded.read import TensorInfo, open_sharded
from fabric_core.checkpoint.tree import replaced
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.types import Path

_DATA_FILE = re.compile(r"__(\d+)_\d+(\.[^.]+)?\.distcp")


@dataclass(frozen=True)
class TensorRow:
    """One tensor. ``nbytes`` is its size in bytes, ``tied_to`` the name of the tensor whose memory it shares."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    tied_to: str | None = None


@dataclass(frozen=True)
class Part:
    """What is stored under one name at the top level: a module, an optimizer, or a value of some type."""

    name: str
    kind: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    Attributes:
        path: what was looked at.
        format: ``file``, ``sharded``, ``safetensors``, or the name of a layout that a plugin reads.
        written_by: as far as the checkpoint says; ``None`` if it does not.
        world_size: how many processes wrote it; ``None`` if that cannot be told.
        parts: what is at the top level, extras included; for bare weights, one part without a name.
        extras: type by name, of what is no module, optimizer or tensor.
        rows: all tensors.
    """

    path: str
    format: str
    written_by: str | None
    world_size: int | None
    parts: list[Part]
    extras: dict[str, str]
    rows: list[TensorRow] = field(repr=False)

    @property
    def stored(self) -> list[TensorRow]:
        """The tensors, tied ones once."""
        return [row for row in self.rows if row.tied_to is None]

    @property
    def elements(self) -> int:
        """How many numbers are stored in tensors."""
        return sum(map(_elements, self.stored))

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors are."""
        return sum(row.nbytes for row in self.stored)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors are of which dtype, the most frequent first."""
        return dict(Counter(row.dtype for row in self.stored).most_common())


def describe(path: Path) -> Description:
    """What the file, folder, object or URL ``path`` holds.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: it is damaged, or no checkpoint.
        UsageError: it needs a library that is not installed.
        UnsafeCheckpointError: a plugin reads it, and it holds more than tensors and plain values.
    """
    if is_sharded(path):
        return _sharded(path)
    foreign = find_foreign(path)
    if foreign is not None:
        return _foreign(path, foreign)
    if is_safetensors(path):
        return _described(path, "safetensors", None, None, _weights(path))
    with open_binary(path) as file:
        tree = read_skeleton(file, os.fspath(path))
    version = tree.get("pytorch-lightning_version") if isinstance(tree, Mapping) else None
    writer = f"Lightning's Trainer {version}" if isinstance(version, str) else None
    return _described(path, "file", writer, None, tree)


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file or object, opened for reading."""
    if is_remote(path):
        filesystem, inside = open_filesystem(path)
        if not filesystem.exists(inside):
            raise FileNotFoundError(f"There is no checkpoint at {os.fspath(path)!r}.")
        with filesystem.open(inside, "rb") as file:
            yield file
        return
    local = resolve(path)
    if not os.path.exists(local):
        raise FileNotFoundError(f"There is no checkpoint at {local!r} (from {os.getcwd()!r}).")
    if os.path.isdir(local):
        raise CheckpointError(
            f"{local!r} is a folder that holds no sharded checkpoint: it has no {METADATA!r}; and no plugin reads it."
        )
    with open(local, "rb") as file:
        yield file


def _weights(path: Path) -> dict[str, TensorOutline]:
    with open_binary(path):  # for its errors
        if is_remote(path):
            return {name: _outline(tensor, id(tensor)) for name, tensor in load_safetensors(path).items()}
        opened = open_safetensors(resolve(path))
    try:
        return {name: _outline(tensor, id(tensor)) for name, tensor in opened.content.items()}
    finally:
        opened.close()


def _outline(tensor: Tensor | TensorInfo | StreamedTensor, memory: object) -> TensorOutline:
    return TensorOutline(torch.Size(tensor.shape), tensor.dtype, str(memory), ())


def _sharded(path: Path) -> Description:
    with open_sharded(path) as source:
        tree = nested(source, lambda key: _outline(source.tensors[key], key) if key in source.tensors else StandIn())
        manifest, content = source.manifest, source.read_extras()
        ranks = [int(match[1]) for name in source.file_names if (match := _DATA_FILE.fullmatch(name))]
    foreign = "torch.distributed.checkpoint" if content is None else "Lightning Fabric"
    extras = {} if content is None else read_skeleton(io.BytesIO(content), f"{os.fspath(path)}/{EXTRAS}")
    if manifest is None:
        return _described(path, "sharded", foreign, max(ranks, default=0) + 1, {**tree, **extras})
    writer = f"Fabric {manifest.fabric} with torch {manifest.torch}"
    return _described(path, "sharded", writer, manifest.world_size, {**tree, **extras})


def _foreign(path: Path, folder: ForeignFolder) -> Description:
    def outlined(leaf: Any) -> Any:
        return _outline(leaf, id(leaf)) if isinstance(leaf, StreamedTensor | Tensor) else leaf

    content, origin = replaced(folder.read(True), outlined), folder.origin
    return _described(path, folder.format, origin.written_by, origin.world_size, content)


def _described(path: Path, format: str, writer: str | None, world_size: int | None, tree: Any) -> Description:
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{os.fspath(path)!r} holds a {_type_name(tree)}, not a dict of named states.")
    named = {"": tree} if kind_of(tree, TensorOutline) == "module" else tree
    parts = [_part(str(name), value) for name, value in named.items()]
    extras = {part.name: part.kind for part in parts if part.kind not in KINDS}
    return Description(os.fspath(path), format, writer, world_size, parts, extras, _rows(tree))


def _part(name: str, value: Any) -> Part:
    kind = kind_of(value, TensorOutline) or _type_name(value)
    own = [row for row in _rows(value) if row.tied_to is None]
    return Part(name, kind, len(own), sum(map(_elements, own)), sum(row.nbytes for row in own))


def _elements(row: TensorRow) -> int:
    return torch.Size(row.shape).numel()


def _rows(tree: Any) -> list[TensorRow]:
    rows: list[TensorRow] = []
    seen: dict[object, str] = {}
    for name, leaf in _named(tree, ""):
        if isinstance(leaf, TensorOutline):
            memory = (leaf.storage, leaf.shape, leaf.view) if leaf.shape.numel() else object()
            first = seen.setdefault(memory, name)
            size = leaf.shape.numel() * leaf.dtype.itemsize if leaf.dtype else 0
            dtype = str(leaf.dtype).removeprefix("torch.") if leaf.dtype else "unknown"
            rows.append(TensorRow(name, tuple(leaf.shape), dtype, size, None if first == name else first))
    return rows


def _named(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All leaves with their names, in order, as ``model.layer.weight``."""
    if isinstance(node, Mapping):
        children: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    else:
        yield name, node
        return
    for key, child in children:
        yield from _named(child, f"{name}.{key}" if name else str(key))


def _type_name(value: Any) -> str:
    return (value.kind or "stored object") if isinstance(value, StandIn) else type(value).__name__
