"""Checkpoints in layouts that core does not know: a plugin reads them, and everything that loads can use them.

A plugin says so by the hook ``fabric_checkpoint_reader``. The registry lies above this layer, so it is reached when it
is needed, as name tables do.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.kinds import kind_of
from fabric_core.checkpoint.conversion.streams import StreamedTensor
from fabric_core.checkpoint.dtensors import part_for
from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.paths import is_remote, resolve
from fabric_core.checkpoint.sharded.boxes import is_dtensor
from fabric_core.checkpoint.sharded.layout import SHARDED, FolderLayout, moved_aside
from fabric_core.checkpoint.tree import leaves, replaced
from fabric_core.errors import CheckpointError, InvalidTypeError

if TYPE_CHECKING:
    from fabric_core.types import Path

_HOOK = "fabric_checkpoint_reader"


@dataclass(frozen=True)
class Origin:
    """Who wrote a checkpoint, as far as it says.

    Attributes:
        written_by: the program, and its version.
        world_size: how many processes.
    """

    written_by: str | None = None
    world_size: int | None = None


class CheckpointReader(Protocol):
    """Reads checkpoints of one layout. Any process calls it, alone or at the same time as others.

    Attributes:
        format: the layout's name, for messages.
        layout: how the folder looks from outside, for those that replace it. Without it, or with ``None``, no save of
            another layout ever replaces such a folder.
        origin: a method, optional too, that takes the folder and says who wrote it, as an ``Origin``. It runs no code
            from the files.
    """

    format: str

    def __call__(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        """What the folder ``path`` holds, by the names that the user gave.

        States of modules are dicts of their tensors. States of optimizers are what their ``state_dict`` is, with the
        names of parameters in the place of numbers if they are known. Their tensors are ``StreamedTensor``, which are
        read when they are wanted: nobody needs all of them in memory. Everything else is as it was saved.

        Args:
            path: the folder.
            weights_only: ``False`` allows code from the files to run, ``None`` and ``True`` do not.

        Raises:
            UnsafeCheckpointError: something in the files can only be read by running code.
            CheckpointError: they are damaged.
        """
        ...


@dataclass(frozen=True)
class ForeignFolder:
    """A checkpoint that a plugin can read.

    Attributes:
        path: the folder; that of the user, or where an interrupted replacement has put it.
        reader: reads it.
    """

    path: str
    reader: CheckpointReader

    @property
    def format(self) -> str:
        """The layout's name."""
        return str(getattr(self.reader, "format", "foreign"))

    @property
    def origin(self) -> Origin:
        """Who wrote it, as far as the reader knows."""
        ask = getattr(self.reader, "origin", None)
        return Origin() if ask is None else ask(self.path)

    def read(self, weights_only: bool | None) -> dict[str, Any]:
        """What it holds, as ``CheckpointReader`` says."""
        content = self.reader(self.path, weights_only)
        if not isinstance(content, dict):
            raise InvalidTypeError(
                f"The reader of {self.format} gave a {type(content).__name__} for {self.path!r}; it must be a dict of "
                "states by name."
            )
        return content


def find_foreign(path: Path) -> ForeignFolder | None:
    """The folder ``path`` with a plugin's reader for it; ``None`` if no plugin knows it, or it is no local folder.

    Where an interrupted replacement has left nothing at ``path``, what it moved aside counts.
    """
    if is_remote(path):
        return None
    target = os.path.realpath(resolve(path))
    for folder in [target] if os.path.lexists(target) else moved_aside(target):
        reader = _ask(folder) if os.path.isdir(folder) else None
        if reader is not None:
            return ForeignFolder(folder, reader)
    return None


def layout_of(folder: str) -> FolderLayout | None:
    """The layout of the checkpoint in a local folder, core's own or a plugin's; ``None`` if it holds no checkpoint."""
    if SHARDED.is_in(folder):
        return SHARDED
    layout: FolderLayout | None = getattr(_ask(folder) if os.path.isdir(folder) else None, "layout", None)
    return layout if layout is not None and layout.is_in(folder) else None


def find_foreign_around(path: Path) -> ForeignFolder | None:
    """The checkpoint of a plugin's layout that the local file ``path`` lies in, at most two levels down."""
    if is_remote(path):
        return None
    file = os.path.realpath(resolve(path))
    if not os.path.isfile(file):
        return None
    parent = os.path.dirname(file)
    return find_foreign(parent) or find_foreign(os.path.dirname(parent))


def _ask(folder: str) -> CheckpointReader | None:
    registry = importlib.import_module("fabric_core.registry").get_registry()
    if not registry.has_hook(_HOOK):
        return None
    answer: CheckpointReader | None = registry.hooks.fabric_checkpoint_reader(path=folder)
    if answer is not None and not callable(answer):
        raise InvalidTypeError(f"{_HOOK} answered {answer!r}, where a function of path and weights_only was expected.")
    return answer


@contextmanager
def open_foreign(folder: ForeignFolder, weights_only: bool | None) -> Iterator[ForeignCheckpoint]:
    """The checkpoint, while the block runs."""
    yield ForeignCheckpoint(folder.read(weights_only))


class ForeignCheckpoint(OpenCheckpoint):
    """What a reader gave, as an opened checkpoint. Streamed tensors are represented by ones on the meta device.

    Attributes:
        content: as the reader gave it.
    """

    is_folder = True

    def __init__(self, content: dict[str, Any]) -> None:
        self._streams: dict[int, StreamedTensor] = {}
        self._windows: list[Tensor] = []  # kept, so that no id is used twice
        self._states = {key for key, value in content.items() if _is_state(value)}
        super().__init__(replaced(content, self._stand_in))

    def _stand_in(self, leaf: Any) -> Any:
        if not isinstance(leaf, StreamedTensor):
            return leaf
        window = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        self._streams[id(window)] = leaf
        self._windows.append(window)
        return window

    def is_window(self, tensor: Tensor) -> bool:
        """Whether the tensor stands for a streamed one."""
        return id(tensor) in self._streams

    def is_alone(self, tensor: Tensor) -> bool:
        """Streamed tensors share nothing."""
        return True

    @torch.no_grad()
    def read(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Read this rank's part of each destination. No rank needs another for it."""
        for window, destination in pairs:
            if id(window) not in self._streams:  # it is in memory
                super().read([(window, destination)])
            elif is_dtensor(destination):
                part, memory = part_for(self._whole(window), destination)
                memory.copy_(part)
            else:
                self.read_into(window, destination)

    @torch.no_grad()
    def read_into(self, window: Tensor, destination: Tensor) -> None:
        """Write the values of a window to memory of the same shape. ``CheckpointError`` if they are too few."""
        stream = self._streams.get(id(window))
        if stream is None:
            super().read_into(window, destination)
            return
        if not destination.is_contiguous():
            destination.copy_(self._whole(window))
            return
        flat, done = destination.view(-1), 0
        for piece in stream.pieces():
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
        if done != flat.numel():
            raise CheckpointError(f"A tensor of {flat.numel()} elements brought {done}: the checkpoint is damaged.")

    def _whole(self, window: Tensor) -> Tensor:
        whole = torch.empty(window.shape, dtype=window.dtype)
        self.read_into(window, whole)
        return whole

    def own(self, tree: Any) -> Any:
        """A copy of ``tree`` with everything in it in host memory; tied tensors are tied again."""
        made = {id(leaf): self._whole(leaf) for _, leaf in leaves(tree, "") if id(leaf) in self._streams}
        return replaced(tree, lambda leaf: made.get(id(leaf), leaf))

    def rest(self, asked: Iterable[Any]) -> dict[Any, Any]:
        """What is of no module and no optimizer: the states of those that nobody asked for stay where they are."""
        asked = set(asked)
        return {key: value for key, value in self.content.items() if key not in asked and key not in self._states}


def _is_state(value: Any) -> bool:
    """Whether it is the state of a module or an optimizer."""
    streams = any(isinstance(leaf, StreamedTensor) for _, leaf in leaves(value, ""))
    return streams or kind_of(value, StreamedTensor) == "optimizer"
