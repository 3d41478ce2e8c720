"""A checkpoint that rank 0 alone can or should read: the others get its structure, then tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fabric_core.checkpoint.dtensors import part_for
from fabric_core.checkpoint.exchange import broadcast
from fabric_core.checkpoint.lazy import OpenCheckpoint, is_plain_tensor
from fabric_core.checkpoint.tree import leaves, replaced
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks


class RelayedCheckpoint(OpenCheckpoint):
    """What rank 0 has opened, on every rank. No rank holds more than the tensor that is on its way.

    Every rank makes one, and calls ``read`` and ``own`` equally often.

    Args:
        source: the opened checkpoint on rank 0, ``None`` on the others.
        ranks: all ranks of the default process group.
    """

    def __init__(self, source: OpenCheckpoint | None, ranks: Ranks) -> None:
        self._source, self._ranks = source, ranks
        self._originals: list[Tensor] = []
        outline: Any = None
        if source is not None:
            content = source.values(source.content)
            self._originals = _tensors(content)
            outline = _without_memory(content), list(source.rest(())), source.is_folder
        content, self._returned, self.is_folder = ranks.broadcast(outline)
        super().__init__(content)
        self._windows = _tensors(content)  # in the same order everywhere
        self._numbers = {id(window): number for number, window in enumerate(self._windows)}

    def is_window(self, tensor: Tensor) -> bool:
        """Whether the tensor's values are still with rank 0."""
        return id(tensor) in self._numbers

    def is_alone(self, tensor: Tensor) -> bool:
        """What shared memory in the checkpoint does so no longer."""
        return True

    @torch.no_grad()
    def read(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Bring to each rank its part of each of its destinations. Every rank calls it, with whatever it wants.

        ``CheckpointError`` on all ranks if rank 0 cannot read on.
        """
        wanted: dict[int, list[Tensor]] = {}
        for window, destination in pairs:
            if self.is_window(window):
                wanted.setdefault(self._numbers[id(window)], []).append(destination)
            else:  # no plain tensor: it came with the structure
                super().read([(window, destination)])
        problem: Exception | None = None
        for number in sorted(set().union(*self._ranks.gather(list(wanted)))):
            window = self._windows[number]
            whole = torch.empty(window.shape, dtype=window.dtype, device="cpu")
            if self._source is not None and problem is None:
                try:
                    self._source.read([(self._originals[number], whole)])
                except Exception as error:  # the others wait for a tensor, so they get one, and the error at the end
                    problem = error
            broadcast(whole)
            for destination in wanted.get(number, ()):
                part, memory = part_for(whole, destination)
                memory.copy_(part)
        text = self._ranks.broadcast(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        if text is not None:
            raise CheckpointError(f"Rank 0, which reads the checkpoint for all ranks, failed: {text}")

    def own(self, tree: Any) -> Any:
        """A copy of ``tree`` with its tensors in host memory. Every rank calls it with the same tree."""
        windows = {id(leaf): leaf for _, leaf in leaves(tree, "") if id(leaf) in self._numbers}
        made = {id_: torch.empty(window.shape, dtype=window.dtype) for id_, window in windows.items()}
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
