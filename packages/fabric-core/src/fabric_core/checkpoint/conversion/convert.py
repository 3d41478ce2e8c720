"""From any form of a checkpoint to another one: a single file, a sharded folder, or a safetensors file of weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.consolidate import is_folder_checkpoint, streamed_folder
from fabric_core.checkpoint.conversion.kinds import kind_of, tensors_of
from fabric_core.checkpoint.conversion.single_file import write_archive, write_file
from fabric_core.checkpoint.conversion.streams import Progress, ProgressBar, StreamedTensor, shown, streamed
from fabric_core.checkpoint.lazy import OpenCheckpoint, is_plain_tensor
from fabric_core.checkpoint.paths import is_remote, open_filesystem, resolve
from fabric_core.checkpoint.safetensors_io import is_safetensors, write_safetensors
from fabric_core.checkpoint.sharded.layout import is_sharded
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.write import write_sharded
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.tree import replaced
from fabric_core.errors import CheckpointError, InvalidArgumentError

if TYPE_CHECKING:
    from fabric_core.types import Path

FORMATS: Final = ("file", "sharded", "safetensors")
_FILE_SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".bin", ".consolidated")
_TENSORS: Final = (StreamedTensor, Tensor)


@dataclass(frozen=True)
class Conversion:
    """What was asked for.

    Attributes:
        source: a file, folder, object or URL in any of the formats, or a folder that a plugin reads.
        target: what to write.
        to: one of ``FORMATS``.
        key: the module whose weights to take out of a checkpoint; for bare weights, the name to store them under.
        dtype: what the floating-point weights of modules become; optimizer state is left as it is.
        weights_only: ``False`` runs code from the source.
    """

    source: Path
    target: Path
    to: str
    key: str | None = None
    dtype: torch.dtype | None = None
    weights_only: bool | None = None


def format_of(target: Path) -> str:
    """The format that the name of something to be written stands for.

    ``InvalidArgumentError`` if it stands for none.
    """
    text = os.fspath(target)
    if is_safetensors(target):
        return "safetensors"
    if text.lower().endswith(_FILE_SUFFIXES):
        return "file"
    if text.endswith(("/", os.sep)) or is_sharded(target):
        return "sharded"
    raise InvalidArgumentError(
        f"{text!r} does not say which format it should have: end it in .safetensors, .ckpt or .pt, or in a slash for a "
        "sharded folder; or pass --to file, --to sharded or --to safetensors."
    )


def exists(path: Path) -> bool:
    """Whether something is there already."""
    if is_remote(path):
        filesystem, inside = open_filesystem(path)
        return bool(filesystem.exists(inside))
    return os.path.lexists(resolve(path))


def convert(wish: Conversion, bar: ProgressBar | None = None) -> list[str]:
    """Write the source in the form that was asked for, complete or not at all, tensor by tensor. One process calls it.

    Returns:
        What could not be taken along: the names of extra states of modules, which safetensors has no place for.

    Raises:
        FileNotFoundError: nothing is at the source.
        InvalidArgumentError: ``key`` is needed, or is not there.
        CheckpointError: the source is damaged, or holds no weights where they are needed.
        UnsafeCheckpointError: the source holds more than tensors and plain values.
    """
    weights_alone = wish.to == "safetensors" or wish.key is not None
    with _open_streamed(wish.source, wish.weights_only, extras=not weights_alone) as state:
        state, left_out = _chosen(wish, state)
        if wish.dtype is not None:
            state = _cast(state, wish.dtype)
        with shown(bar, state) as progress:
            if wish.to == "safetensors":
                write_safetensors(wish.target, state, progress)
            elif wish.to == "file":
                write_file(wish.target, state, progress)
            else:
                _write_sharded(wish, state, progress)
    return left_out


@contextmanager
def _open_streamed(path: Path, weights_only: bool | None, *, extras: bool) -> Iterator[dict[Any, Any]]:
    """What a checkpoint in any format holds, as one nested dict, with ``StreamedTensor`` in the place of tensors."""
    if is_folder_checkpoint(path):
        with streamed_folder(path, weights_only, extras) as state:
            yield state
        return
    with TorchCheckpointIO().open_checkpoint(path, weights_only) as opened:
        if not isinstance(opened.content, dict):
            kind = type(opened.content).__name__
            raise CheckpointError(f"{os.fspath(path)!r} holds a {kind}, not a dict of named states.")
        yield _streamed(opened)


def _streamed(opened: OpenCheckpoint) -> dict[Any, Any]:
    streams: dict[Any, StreamedTensor] = {}

    def change(leaf: Any) -> Any:
        if not (is_plain_tensor(leaf) and leaf.device.type == "cpu"):
            return leaf
        # Tensors on the same memory are tied: they are the same stream.
        memory = (leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()) if leaf.numel() else id(leaf)
        return streams.setdefault(memory, streamed(leaf, opened))

    state: dict[Any, Any] = replaced(opened.content, change)
    return state


def _chosen(wish: Conversion, state: dict[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """What is to be written, and what of it the format has no place for."""
    bare = kind_of(state, _TENSORS) == "module"
    if bare and wish.key is not None:
        if wish.to == "safetensors":
            raise InvalidArgumentError(f"--key {wish.key}: {os.fspath(wish.source)!r} holds weights without a name.")
        return {wish.key: state}, []
    if not bare and (wish.key is not None or wish.to == "safetensors"):
        state = state[_module_name(wish, state)]
    if wish.to != "safetensors":
        return state, []
    weights = tensors_of(state, _TENSORS)
    left_out = [key for key in state if key not in weights]
    return {name: _dense(name, tensor) for name, tensor in weights.items()}, left_out


def _dense(name: str, tensor: StreamedTensor | Tensor) -> StreamedTensor:
    if isinstance(tensor, StreamedTensor):
        return tensor
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{name!r} is a sparse, quantized or empty tensor, which a safetensors file cannot hold.")
    return streamed(tensor)


def _module_name(wish: Conversion, state: dict[Any, Any]) -> str:
    modules = [name for name, value in state.items() if kind_of(value, _TENSORS) == "module"]
    source = repr(os.fspath(wish.source))
    if not modules:
        raise CheckpointError(f"{source} holds no module's weights: it has {', '.join(map(repr, state)) or 'nothing'}.")
    listed = ", ".join(map(repr, modules))
    if wish.key is None and len(modules) > 1:
        raise InvalidArgumentError(f"{source} holds the weights of {listed}: say which with --key {modules[0]}.")
    if wish.key is not None and wish.key not in modules:
        raise InvalidArgumentError(f"--key {wish.key}: {source} holds no weights under that name, but under {listed}.")
    return modules[0] if wish.key is None else wish.key


def _cast(state: dict[Any, Any], dtype: torch.dtype) -> dict[Any, Any]:
    done: dict[int, StreamedTensor] = {}

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, StreamedTensor) or not leaf.dtype.is_floating_point:
            return leaf
        return done.setdefault(id(leaf), leaf.to(dtype))

    if kind_of(state, _TENSORS) == "module":
        weights: dict[Any, Any] = replaced(state, change)
        return weights
    return {
        name: replaced(value, change) if kind_of(value, _TENSORS) == "module" else value
        for name, value in state.items()
    }


def _write_sharded(wish: Conversion, state: dict[Any, Any], progress: Progress | None) -> None:
    """Through a file beside the target: what is written is then mapped, and not in memory."""
    target = os.fspath(wish.target).rstrip("/" + os.sep)
    folder = None if is_remote(target) else os.path.dirname(os.path.realpath(resolve(target)))
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
    with _draft(folder) as (file, name):
        write_archive(file, state, progress)
        file.flush()
        content = torch.load(name, map_location="cpu", mmap=True, weights_only=wish.weights_only is not False)
        bare = kind_of(content, Tensor) == "module"
        sharded = {k: v for k, v in content.items() if bare or kind_of(v, Tensor) in ("module", "optimizer")}
        write_sharded(target, sharded, {k: v for k, v in content.items() if k not in sharded}, ranks_of(None))


@contextmanager
def _draft(folder: str | None) -> Iterator[tuple[BinaryIO, str]]:
    """A file that is gone in the end, and a name by which it can be opened until then."""
    if os.path.isdir("/proc/self/fd"):
        with tempfile.TemporaryFile(dir=folder) as nameless:  # gone even if this process is killed
            yield nameless, f"/proc/self/fd/{nameless.fileno()}"
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial") as named:
        yield cast(BinaryIO, named), named.name
