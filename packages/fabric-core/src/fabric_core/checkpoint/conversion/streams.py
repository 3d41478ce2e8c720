"""Tensors that are not in memory, and how their bytes reach a file: piece by piece."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.tree import leaves
from fabric_core.errors import CheckpointError

_PIECE: Final = 16 * 2**20  # bytes

Progress = Callable[[int], object]
"""Called with the number of bytes that were just written."""
ProgressBar = Callable[[int], AbstractContextManager[Progress]]
"""Given the number of bytes in all, a context that gives the function to call while they are written."""


class _Sink(Protocol):
    def write(self, content: Any, /) -> object: ...


@dataclass(frozen=True, eq=False)
class StreamedTensor:
    """A tensor that is not in memory. The same object in two places is one tensor, tied as before.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        pieces: brings the values, in order: contiguous tensors of ``dtype`` on the CPU. A piece may be written over
            when the next one is asked for.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> StreamedTensor:
        """The tensor in another dtype."""
        return StreamedTensor(self.shape, dtype, lambda: (piece.to(dtype) for piece in self.pieces()))

    def write_to(self, sink: _Sink, progress: Progress | None = None) -> None:
        """Write all bytes. ``CheckpointError`` if there are more or fewer of them than there should be."""
        missing = self.nbytes
        for piece in self.pieces() if missing else ():
            missing -= piece.nbytes
            if missing >= 0 and piece.nbytes:
                sink.write(_bytes_of(piece))
            if progress is not None:
                progress(piece.nbytes)
        if missing:
            raise CheckpointError(f"A tensor of {self.nbytes} bytes brought {self.nbytes - missing}.")


def streamed(tensor: Tensor, source: OpenCheckpoint | None = None) -> StreamedTensor:
    """A plain tensor as a stream: one in memory, or a window on an opened checkpoint, whose bytes are read then."""
    if source is None or not source.is_window(tensor):
        return StreamedTensor(tensor.shape, tensor.dtype, lambda: in_pieces(tensor))
    return StreamedTensor(tensor.shape, tensor.dtype, lambda: _read_in_pieces(tensor, source))


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor in order, piece by piece; without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    length = _length(tensor)
    return (flat[first : first + length] for first in range(0, flat.numel(), length))


def _read_in_pieces(window: Tensor, source: OpenCheckpoint) -> Iterator[Tensor]:
    if not window.is_contiguous():
        whole = torch.empty(window.shape, dtype=window.dtype)
        source.read_into(window, whole)
        yield from in_pieces(whole)
        return
    flat, length = window.detach().view(-1), _length(window)
    buffer = torch.empty(min(length, flat.numel()), dtype=window.dtype)
    for first in range(0, flat.numel(), length):
        part = flat[first : first + length]
        source.read_into(part, buffer[: part.numel()])
        yield buffer[: part.numel()]


def shown(bar: ProgressBar | None, tree: Any) -> AbstractContextManager[Progress | None]:
    """A context for writing the streamed tensors in ``tree``, each counted once."""
    if bar is None:
        return nullcontext(None)
    return bar(size_of(tree))


def size_of(tree: Any) -> int:
    """How many bytes the streamed tensors in ``tree`` are, each counted once."""
    return sum({id(leaf): leaf.nbytes for _, leaf in leaves(tree, "") if isinstance(leaf, StreamedTensor)}.values())


def _length(tensor: Tensor) -> int:
    """How many elements make a piece."""
    return max(1, _PIECE // tensor.element_size())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. The tensor must live as long as the view is used."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
