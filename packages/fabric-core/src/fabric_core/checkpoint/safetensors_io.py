"""Weights in the safetensors format: eight bytes with the header's length, the header as JSON, the bytes of tensors.

Such a file holds one flat dict of tensors, as a module's state, and no code by design. Tensors share no memory in it:
of tied ones one is stored, and the header's metadata says of the others ``{"name": "name that is stored"}``, as the
library's own ``save_model`` does; opening the file ties them again. It is written here, piece by piece; it is read
through the library, from ``fabric-core[safetensors]``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fabric_core.checkpoint.commit import publish
from fabric_core.checkpoint.conversion.streams import Progress, StreamedTensor
from fabric_core.checkpoint.lazy import MappedCheckpoint, find_reader
from fabric_core.checkpoint.paths import is_remote, open_filesystem, resolve
from fabric_core.errors import CheckpointError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from fabric_core.types import Path

SUFFIX: Final = ".safetensors"
_FORMAT: Final = "format"  # the one entry of the metadata that programs look at
_NAMES: Final = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("uint", "int", "float") for bits in (8, 16, 32, 64)},
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
"""What the format calls a dtype, by its name in torch."""


def is_safetensors(path: Path) -> bool:
    """Whether the name says so; torch itself goes by that too."""
    return os.fspath(path).lower().endswith(SUFFIX)


def load_safetensors(path: Path, location: Any = "cpu") -> dict[str, Tensor]:
    """The tensors of a local file, an object or a web address, in memory on ``location``; tied ones share it.

    Args:
        path: where they are.
        location: a device, or what else ``torch.load`` takes as ``map_location``.

    Raises:
        UsageError: the library is not installed.
        CheckpointError: the file is damaged.
    """
    with _at_hand(path) as local:
        opened = open_safetensors(local)
        try:
            content: dict[str, Tensor] = opened.own(opened.content)
        finally:
            opened.close()
    if location == "cpu":
        return content
    moved = {id(tensor): _moved(tensor, location) for tensor in content.values()}
    return {name: moved[id(tensor)] for name, tensor in content.items()}


def _moved(tensor: Tensor, location: Any) -> Tensor:
    if callable(location):
        storage = location(tensor.untyped_storage(), "cpu")
        return tensor if storage is None else torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)
    return tensor.to(location.get("cpu", "cpu") if isinstance(location, Mapping) else location)


@contextmanager
def _at_hand(path: Path) -> Iterator[str]:
    """The file under a local name: its own, or that of a copy for as long as the context lasts."""
    if not is_remote(path):
        yield resolve(path)
        return
    filesystem, inside = open_filesystem(path)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, f"copy{SUFFIX}")
        filesystem.get_file(inside, local)
        yield local


def open_safetensors(path: str) -> MappedCheckpoint:
    """Open a local file; its tensors are windows on it.

    Raises:
        UsageError: the library is not installed.
        CheckpointError: the file is damaged.
    """
    library = _library(path)
    with open(path, "rb") as file:
        # The open file's own name, where there is one: another file may take the place of `path` at any time.
        name = f"/proc/self/fd/{file.fileno()}"
        name = name if os.path.exists(name) else path
        try:
            with library.safe_open(name, framework="pt") as opened:
                content = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
                metadata = opened.metadata() or {}
        except library.SafetensorError as error:
            raise CheckpointError(f"{path!r} cannot be read, it may be damaged: {error}") from error
        windows = list(content.values())
        reader = find_reader(file.fileno(), windows, path) if sys.byteorder == "little" else None
        content.update({tied: content[kept] for tied, kept in ties(content, metadata).items()})
        return MappedCheckpoint(content, windows, path, reader)


def ties(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """The names that are not stored, because they share the memory of another one, with that other one."""
    names = set(names)
    return {tied: kept for tied, kept in metadata.items() if kept in names and tied not in names and tied != _FORMAT}


def write_safetensors(path: Path, tensors: Mapping[str, StreamedTensor], progress: Progress | None = None) -> None:
    """Write ``tensors`` to the file or object ``path``, complete or not at all; one piece of one is in memory.

    Args:
        path: where to; parent folders are made.
        tensors: by name. Of names for the same object, the first in alphabetical order is stored, the others noted.
        progress: called with the number of bytes that were just written.

    Raises:
        UnsupportedError: the format has no name for a dtype.
        CheckpointError: the format reserves a name; or a tensor brings too few or too many values.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("safetensors files are little-endian, which this machine is not.")
    stored, metadata = _without_ties(tensors)
    # The widest first: then each starts at a multiple of its own width. And the same input gives the same file.
    order = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name))
    header = _header([(name, stored[name]) for name in order], metadata)
    with publish(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            stored[name].write_to(file, progress)


def _without_ties(tensors: Mapping[str, StreamedTensor]) -> tuple[dict[str, StreamedTensor], dict[str, str]]:
    stored: dict[str, StreamedTensor] = {}
    metadata = {_FORMAT: "pt"}
    names: dict[int, str] = {}
    for name in sorted(tensors):
        first = names.setdefault(id(tensors[name]), name)
        if name in (first, _FORMAT):
            stored[name] = tensors[name]
        else:
            metadata[name] = first
    return stored, metadata


def _header(tensors: Iterable[tuple[str, StreamedTensor]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors:
        if name in entries:
            raise CheckpointError(f"A tensor cannot be called {name!r} in a safetensors file.")
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def _dtype(name: str, tensor: StreamedTensor) -> str:
    known = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if known is None:
        raise UnsupportedError(f"{name!r} is of {tensor.dtype}, which the safetensors format has no name for.")
    return known


def _library(path: str) -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise UsageError(
            f"{path!r} needs the safetensors library to be read: pip install 'fabric-core[safetensors]'."
        ) from error
