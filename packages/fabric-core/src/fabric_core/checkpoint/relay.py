"""A checkpoint that rank 0 alone can or should read: the others get its structure, then tensor by tensor."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.dtensors import part_for
from fabric_core.checkpoint.lazy import OpenCheckpoint, is_plain_tensor
from fabric_core.checkpoint.transport import Carrier
from fabric_core.checkpoint.tree import leaves, replaced

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks

_FAILED: Final = "The checkpoint, which rank 0 reads for all ranks, was not loaded"


class RelayedCheckpoint(OpenCheckpoint):
    """What rank 0 has opened, on every rank. No rank holds more than the tensor that is on its way.

    Every rank makes one, and calls ``read`` and ``own`` equally often. What fails on one rank, fails on all.

    Args:
        source: the opened checkpoint on rank 0, ``None`` on the others.
        ranks: all ranks of the default process group, over which the tensors travel.

    Raises:
        Exception: rank 0 cannot read what is no tensor; on the other ranks as ``together`` says.
    """

    def __init__(self, source: OpenCheckpoint | None, ranks: Ranks) -> None:
        self._source, self._ranks = source, ranks
        self._originals: list[Tensor] = []
        # As bytes: an object that cannot be sent is a failure before anybody waits for it.
        outline = ranks.broadcast(together(ranks, self._outline, _FAILED))
        content, self._returned, self.is_folder = pickle.loads(outline)
        super().__init__(content)
        self._windows = _tensors(content)  # in the same order everywhere
        self._numbers = {id(window): number for number, window in enumerate(self._windows)}

    def _outline(self) -> bytes:
        if self._source is None:
            return b""
        content = self._source.values(self._source.content)
        self._originals = _tensors(content)
        return pickle.dumps((_without_memory(content), list(self._source.rest(())), self._source.is_folder))

    def is_window(self, tensor: Tensor) -> bool:
        """Whether the tensor's values are still with rank 0."""
        return id(tensor) in self._numbers

    def is_alone(self, tensor: Tensor) -> bool:
        """What shared memory in the checkpoint does so no longer."""
        return True

    @torch.no_grad()
    def read(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Bring to each rank its part of each of its destinations. Every rank calls it, with whatever it wants.

        If one rank cannot go on, none does; what is raised on the others, ``together`` says.
        """
        wanted: dict[int, list[Tensor]] = {}
        others: list[tuple[Tensor, Tensor]] = []
        for window, destination in pairs:
            if self.is_window(window):
                wanted.setdefault(self._numbers[id(window)], []).append(destination)
            else:  # no plain tensor: it came with the structure
                others.append((window, destination))
        numbers = sorted(set().union(*self._ranks.gather(list(wanted))))

        def begun() -> Carrier:
            super(RelayedCheckpoint, self).read(others)
            return Carrier(max((self._windows[number].nbytes for number in numbers), default=0))

        carrier = together(self._ranks, begun, _FAILED)
        problem: Exception | None = None
        for number in numbers:
            window = self._windows[number]
            whole = carrier.place(window.shape, window.dtype)
            try:
                if self._source is not None and problem is None:
                    self._source.read([(self._originals[number], whole)])
            except Exception as error:  # the others wait for a tensor, so they get one, and the error at the end
                problem = error
            carrier.broadcast(whole)
            try:
                for destination in wanted.get(number, ()) if problem is None else ():
                    part, memory = part_for(whole, destination)
                    memory.copy_(part)
            except Exception as error:
                problem = error
        together(self._ranks, lambda: _raise(problem), _FAILED)

    def own(self, tree: Any) -> Any:
        """A copy of ``tree`` with its tensors in host memory. Every rank calls it with the same tree."""
        windows = {id(leaf): leaf for _, leaf in leaves(tree, "") if id(leaf) in self._numbers}

        def allocated() -> dict[int, Tensor]:
            return {id_: torch.empty(window.shape, dtype=window.dtype) for id_, window in windows.items()}

        made = together(self._ranks, allocated, _FAILED)
        self.read([(windows[id_], tensor) for id_, tensor in made.items()])

        def owned(leaf: Any) -> Any:
            tensor = made.get(id(leaf))
            if tensor is None:
                return leaf
            return torch.nn.Parameter(tensor, leaf.requires_grad) if isinstance(leaf, torch.nn.Parameter) else tensor

        return replaced(tree, owned)

    def rest(self, asked: Iterable[Any]) -> dict[Any, Any]:
        """As where rank 0 reads it from."""
        asked = set(asked)
        return {key: self.content[key] for key in self._returned if key not in asked}


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _tensors(tree: Any) -> list[Tensor]:
    found = {id(leaf): leaf for _, leaf in leaves(tree, "") if is_plain_tensor(leaf)}
    return list(found.values())


def _without_memory(tree: Any) -> Any:
    def outline(leaf: Any) -> Any:
        if not is_plain_tensor(leaf):
            return leaf
        empty = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        return torch.nn.Parameter(empty, leaf.requires_grad) if isinstance(leaf, torch.nn.Parameter) else empty

    return replaced(tree, outline)
