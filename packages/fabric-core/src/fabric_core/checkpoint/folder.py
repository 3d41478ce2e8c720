"""A sharded checkpoint as an opened one: its structure is there, everything in it is read when it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        self._read_now = _tell_numbers(folder.places)
        super().__init__({**nested(folder, self._stand_in), **folder.extras})

    def _stand_in(self, key: str) -> Any:
        info = self._folder.tensors.get(key)
        if info is None:
            return self._folder.read_object(key) if key in self._read_now else Stored(key)
        window = torch.empty(info.shape, dtype=info.dtype, device="meta")
        self._keys[id(window)] = key
        self._windows.append(window)
        return window

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
        """What is of no module and no optimizer: the states of those that nobody asked for stay where they are."""
        asked = set(asked)
        manifest = self._folder.manifest
        values = {key: self.content[key] for key in (manifest.values if manifest else ()) if key in self.content}
        return {key: value for key, value in {**values, **self._folder.extras}.items() if key not in asked}


@contextmanager
def open_folder(path: Path, weights_only: bool | None) -> Iterator[FolderCheckpoint]:
    """The sharded checkpoint at ``path``, while the block runs."""
    from fabric_core.checkpoint.sharded.read import open_sharded

    with open_sharded(path, weights_only) as folder:
        yield FolderCheckpoint(folder)


def nested(source: ShardedCheckpoint, value_of: Callable[[str], Any]) -> dict[Any, Any]:
    """What is stored, by flattened keys, as the nested containers that were saved. Extras are not in it.

    Empty containers are not stored. The state of an optimizer that has none yet is known all the same.

    Args:
        source: only its keys are looked at.
        value_of: what to put in for a flattened key.
    """
    tree: dict[Any, Any] = {}
    for key, place in source.places.items():
        node = tree
        for step in place[:-1]:
            node = node.setdefault(step, {})
        node[place[-1]] = value_of(key)
    tree = {key: _with_lists(value) for key, value in tree.items()}
    for value in tree.values():
        if isinstance(value, dict) and isinstance(value.get("param_groups"), list):
            value["state"] = _with_numbers(value.get("state", {}), value["param_groups"])
    return tree


def _with_lists(node: Any) -> Any:
    """Lists where the steps are numbers: the keys of dicts are texts in a sharded checkpoint, whatever they were."""
    if type(node) is not dict:
        return node
    children = {key: _with_lists(value) for key, value in node.items()}
    if children and all(isinstance(key, int) for key in children):
        return [children[key] for key in sorted(children)]
    return children


def _with_numbers(state: Any, groups: list[Any]) -> Any:
    """The state of an optimizer by numbers where its groups have numbers."""
    if not isinstance(state, dict):
        return state
    lists = [group["params"] for group in groups if isinstance(group, dict) and isinstance(group.get("params"), list)]
    ids = [id_ for params in lists for id_ in params]
    numbers = {str(id_): id_ for id_ in ids if isinstance(id_, int)}
    return {numbers.get(key, key): value for key, value in state.items()}


def _tell_numbers(places: Mapping[str, tuple[str | int, ...]]) -> set[str]:
    """The flattened keys of the lists that say whether the keys ``"0"`` of an optimizer's state were numbers."""
    numbered = {
        place[0] for place in places.values() if len(place) > 2 and place[1] == "state" and str(place[2]).isdigit()
    }
    return {
        key
        for key, place in places.items()
        if place[0] in numbered and (place[1:2], place[3:]) == (("param_groups",), ("params",))
    }
