"""A sharded checkpoint as an opened one: its structure is there, everything in it is read when it is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.tree import leaves, replaced

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.read import ShardedCheckpoint
    from fabric_core.types import Path


@dataclass(frozen=True)
class Stored:
    """A python value that is still in the folder."""

    key: str


class FolderCheckpoint(OpenCheckpoint):
    """A sharded checkpoint whose tensors are represented by ones without memory, on the meta device.

    Attributes:
        content: modules and optimizers by name, and the extras beside them.
    """

    is_folder = True

    def __init__(self, folder: ShardedCheckpoint) -> None:
        self._folder = folder
        self._keys: dict[int, str] = {}
        self._windows: list[Tensor] = []  # kept, so that no id is used twice
        flat: dict[tuple[str | int, ...], Any] = {}
        for key, place in folder.places.items():
            info = folder.tensors.get(key)
            if info is None:
                flat[place] = Stored(key)
                continue
            flat[place] = window = torch.empty(info.shape, dtype=info.dtype, device="meta")
            self._keys[id(window)] = key
            self._windows.append(window)
        nested = _nested(flat)
        super().__init__({**nested, **folder.extras})

    def is_window(self, tensor: Tensor) -> bool:
        """Whether the tensor stands for a stored one."""
        return id(tensor) in self._keys

    def is_alone(self, tensor: Tensor) -> bool:
        """Stored tensors share nothing."""
        return True

    def read(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Read this rank's part of each destination. No rank needs another for it."""
        first: dict[str, Tensor] = {}
        again: list[tuple[Tensor, Tensor]] = []
        for window, destination in pairs:
            key = self._keys.get(id(window))
            if key is None:  # one of the extras, which are in memory
                super().read([(window, destination)])
            elif key in first:
                again.append((window, destination))
            else:
                first[key] = destination
        self._folder.read(first)
        if again:
            self.read(again)

    def values(self, tree: Any) -> Any:
        """``tree`` with the python values in it read."""
        keys = [leaf.key for _, leaf in leaves(tree, "") if isinstance(leaf, Stored)]
        if not keys:
            return tree
        with ThreadPoolExecutor(8, thread_name_prefix="checkpoint-reader") as pool:  # a store takes long for each
            found = dict(zip(keys, pool.map(self._folder.read_object, keys), strict=True))
        return replaced(tree, lambda leaf: found[leaf.key] if isinstance(leaf, Stored) else leaf)

    def own(self, tree: Any) -> Any:
        """A copy of ``tree`` with everything in it read to host memory."""
        wanted = {id(leaf): leaf for _, leaf in leaves(tree, "") if id(leaf) in self._keys}
        made = {id_: torch.empty(leaf.shape, dtype=leaf.dtype) for id_, leaf in wanted.items()}
        self._folder.read({self._keys[id_]: tensor for id_, tensor in made.items()})
        return replaced(self.values(tree), lambda leaf: made.get(id(leaf), leaf))

    def rest(self, asked: Iterable[Any]) -> dict[Any, Any]:
        """Extras only: tensors that nobody asked for stay where they are."""
        asked = set(asked)
        return {key: value for key, value in self._folder.extras.items() if key not in asked}


@contextmanager
def open_folder(path: Path, weights_only: bool | None) -> Iterator[FolderCheckpoint]:
    """The sharded checkpoint at ``path``, while the block runs."""
    from fabric_core.checkpoint.sharded.read import open_sharded

    with open_sharded(path, weights_only) as folder:
        yield FolderCheckpoint(folder)


def _nested(flat: Mapping[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """Values by their paths as nested containers; a number in a path is a position in a list."""
    root: dict[Any, Any] = {}
    for path, value in flat.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return {key: _with_lists(value) for key, value in root.items()}


def _with_lists(node: Any) -> Any:
    if type(node) is not dict:
        return node
    if node and all(type(key) is int for key in node):
        return [_with_lists(node[index]) for index in sorted(node)]
    return {key: _with_lists(value) for key, value in node.items()}
