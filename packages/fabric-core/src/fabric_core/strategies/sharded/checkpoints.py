"""Checkpoints of strategies that hold the parameters in parts: a folder that all ranks write, or one gathered file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.portable import clean_name, portable_optimizer_state
from fabric_core.checkpoint.restore import Access
from fabric_core.checkpoint.sharded.boxes import is_dtensor
from fabric_core.checkpoint.sharded.draft import replace_by_file
from fabric_core.checkpoint.sharded.publication import is_folder_to_replace
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.state import collect_state
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.tree import leaves, replaced
from fabric_core.checkpoint.write import write_checkpoint
from fabric_core.errors import InvalidTypeError, UnsupportedError
from fabric_core.strategies.base import Strategy

if TYPE_CHECKING:
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.checkpoint.async_io import AsyncCheckpointIO
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path


class ShardedCheckpoints(Strategy):
    """Saving and loading for strategies over ``DTensor`` parameters. Every rank calls everything here.

    Both kinds of checkpoints load under any strategy and number of processes, because optimizer state is stored by the
    names of the parameters.

    Attributes:
        state_dict_type: ``"sharded"`` saves a folder to which every rank writes what it holds, ``"full"`` one file
            through ``checkpoint_io``, for which rank 0 gathers parameter by parameter.
    """

    votes_on_saving: ClassVar[bool] = True
    state_dict_type: Literal["full", "sharded"] = "sharded"

    def check_initialised(self, module: nn.Module) -> None:
        """``RuntimeError`` that lists the parameters without values, where a strategy can tell."""

    def save_checkpoint(
        self, path: Path, state: dict[str, Any], storage_options: Any = None, filter: dict[str, Any] | None = None
    ) -> None:
        """Write a sharded folder or a full file, complete or not at all.

        With an asynchronous ``checkpoint_io`` this returns once the state is copied; what then fails is raised by the
        next save, and at the end.

        Raises:
            InvalidTypeError: ``storage_options`` for a sharded checkpoint.
            CheckpointError: the parameters of an optimizer are in no module of ``state``.
            IsADirectoryError: a folder is at ``path`` that is no checkpoint.
        """
        ranks = ranks_of()
        path = ranks.broadcast(path)
        sharded = self.state_dict_type == "sharded"
        if sharded:
            self._check_sharded_io(storage_options)
        for module in _modules(state).values():
            self.check_initialised(module)
        collected = together(ranks, lambda: self._collected(state, filter), f"{os.fspath(path)!r} was not written")
        if sharded:
            tensors, extras = _divided(state, collected)
            values = [key for key in tensors if not isinstance(state[key], nn.Module | Optimizer)]
            self._save_sharded(path, _share(state, tensors, ranks.rank), extras, ranks, values)
        else:
            self._save_full(path, collected, storage_options, ranks)

    def load_checkpoint(
        self, path: Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Every rank reads its parts, whatever strategy wrote the file or folder, into the objects in ``state``.

        A file that cannot be read in parts, as one in a store, is read by rank 0 and handed on tensor by tensor.
        """
        return super().load_checkpoint(ranks_of().broadcast(path), state, strict, weights_only)

    def _access(self) -> Access:
        return replace(super()._access(), sharded=True)

    def _collected(self, state: dict[str, Any], filter: dict[str, Any] | None) -> dict[str, Any]:
        """The state of all objects; sharded tensors are still in parts."""
        modules = _modules(state)
        return collect_state(
            state,
            filter,
            module_state=self.get_module_state_dict,
            optimizer_state=lambda optimizer: portable_optimizer_state(optimizer, modules),
        )

    def _check_sharded_io(self, storage_options: Any) -> None:
        if storage_options is not None:
            raise InvalidTypeError(
                f"{type(self).__name__} has no storage options for sharded checkpoints, got {storage_options!r}. Leave "
                'them out, or save with state_dict_type="full" through a CheckpointIO that knows them.'
            )
        io = self.checkpoint_io
        background = _as_async(io)
        inner = io if background is None else background.checkpoint_io
        if type(inner) is not TorchCheckpointIO:
            raise UnsupportedError(
                f'{type(inner).__name__} writes the checkpoint of one process, and state_dict_type="sharded" makes '
                'all processes write. Pass state_dict_type="full" to write through it, or leave it out.'
            )

    def _save_sharded(
        self, path: Path, tensors: dict[str, Any], extras: dict[str, Any], ranks: Ranks, values: list[str]
    ) -> None:
        from fabric_core.checkpoint.sharded.write import write_sharded

        io = _as_async(self.checkpoint_io)
        if io is None:
            write_sharded(path, tensors, extras, ranks, values)
            return
        from fabric_core.checkpoint.async_io import background_group

        others = ranks_of(background_group(getattr(self, "timeout", None)))
        # The copy may wait for an earlier save, and raise its error: on all ranks, or they would part ways here.
        staged = together(ranks, lambda: io.stage((tensors, extras)), f"{os.fspath(path)!r} was not begun")
        io.submit(lambda: write_sharded(path, staged[0], staged[1], others, values), path)

    def _save_full(self, path: Path, collected: dict[str, Any], storage_options: Any, ranks: Ranks) -> None:
        io = self.checkpoint_io
        background = _as_async(io)
        if background is not None:
            together(ranks, background.drain, f"{os.fspath(path)!r} was not begun")  # its copy is as large as this one
        content = gathered(collected, ranks, copy=None if background is None else background.stage)

        def write() -> None:
            if content is None:  # it is on rank 0
                return
            if background is None:
                _write_full(io, path, content, storage_options)
            else:
                inner = background.checkpoint_io
                background.submit(lambda: _write_full(inner, path, content, storage_options), path)

        together(ranks, write, f"{os.fspath(path)!r} was not written")


def _modules(state: Any) -> dict[str, nn.Module]:
    objects = state if isinstance(state, dict) else {}
    return {key: value for key, value in objects.items() if isinstance(value, nn.Module)}


def _divided(state: dict[str, Any], collected: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks write, and what rank 0 writes beside it."""

    def is_shared(key: str) -> bool:
        value = collected[key]
        if isinstance(state[key], nn.Module | Optimizer):
            return bool(value)  # an empty state would leave no trace in the folder
        return any(is_dtensor(leaf) for _, leaf in leaves(value, ""))

    tensors = {key: value for key, value in collected.items() if is_shared(key)}
    return tensors, {key: value for key, value in collected.items() if key not in tensors}


def _share(state: dict[str, Any], tensors: dict[str, Any], rank: int) -> dict[str, Any]:
    """What this rank has to offer. Buffers may differ, as statistics over batches do: rank 0's are stored together."""
    if rank == 0:
        return tensors
    share = dict(tensors)
    for key, module in _modules({key: state[key] for key in tensors}).items():
        parameters = {clean_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        share[key] = {name: value for name, value in tensors[key].items() if name in parameters or is_dtensor(value)}
    return share


@dataclass(frozen=True)
class _Gathered:
    """Stands for a tensor that was gathered already."""

    number: int


def gathered(tree: Any, ranks: Ranks, copy: Callable[[Any], Any] | None = None) -> Any:
    """``tree`` with whole tensors in host memory on rank 0, ``None`` elsewhere.

    Args:
        tree: the same on all ranks but for the parts of sharded tensors.
        ranks: all ranks.
        copy: applied to all but the gathered tensors, which nobody else refers to.
    """
    from fabric_core.checkpoint.transport import Gatherer

    gatherer = Gatherer((leaf for _, leaf in leaves(tree, "")), ranks)
    whole: list[Tensor | None] = []

    def gather(leaf: Any) -> Any:
        if not is_dtensor(leaf):
            return leaf
        whole.append(gatherer.gather(leaf))
        return _Gathered(len(whole) - 1)

    outline = replaced(tree, gather)
    if ranks.rank != 0:
        return None
    outline = outline if copy is None else copy(outline)
    return replaced(outline, lambda leaf: whole[leaf.number] if isinstance(leaf, _Gathered) else leaf)


def _as_async(io: CheckpointIO) -> AsyncCheckpointIO | None:
    """``io`` if it writes in the background."""
    from fabric_core.checkpoint.async_io import AsyncCheckpointIO

    return io if isinstance(io, AsyncCheckpointIO) else None


def _write_full(io: CheckpointIO, path: Path, content: Mapping[str, Any], storage_options: Any) -> None:
    """Write one file, also in the place of a folder, which stays until the file is there."""

    def write(to: Path) -> None:
        write_checkpoint(io, to, dict(content), storage_options)

    if is_folder_to_replace(path):
        replace_by_file(path, write)
    else:
        write(path)
