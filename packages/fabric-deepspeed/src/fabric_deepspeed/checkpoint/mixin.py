"""What DeepSpeedStrategy inherits for checkpoints. Every rank calls everything here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.folder_commit import find_folder
from fabric_core.checkpoint.foreign import ForeignCheckpoint
from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.opening import opened
from fabric_core.checkpoint.paths import is_remote, resolve
from fabric_core.checkpoint.portable import clean_keys
from fabric_core.checkpoint.sharded.layout import is_sharded
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.state import collect_state, validate_filter
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.write import write_checkpoint
from fabric_core.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, UnsupportedError
from fabric_core.strategies import Strategy
from fabric_deepspeed.checkpoint.layout import LAYOUT, claims, mistaken_file
from fabric_deepspeed.checkpoint.live import is_split, live_state, shape_of
from fabric_deepspeed.checkpoint.loading import EngineLoading
from fabric_deepspeed.checkpoint.named import NamedEngine, find_engine, the_engine
from fabric_deepspeed.checkpoint.optimizer_state import gather_state
from fabric_deepspeed.checkpoint.saved import SavedEngine
from fabric_deepspeed.checkpoint.saving import EngineFiles, refuse_other_writers, write_engine
from fabric_deepspeed.checkpoint.weights import check_weights, gather_weights, load_weights
from fabric_deepspeed.engine import engine_of

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path

Keep = Callable[[str, Any], bool]


class DeepSpeedCheckpoints(Strategy):
    """Saving in DeepSpeed's layout, and loading whatever there is, for a strategy whose modules are engines.

    Attributes:
        exclude_frozen_parameters: save no parameters that the optimizer does not train, and miss none when loading.
    """

    votes_on_saving: ClassVar[bool] = True
    exclude_frozen_parameters: bool = False

    def save_checkpoint(
        self, path: Path, state: dict[str, Any], storage_options: Any = None, filter: dict[str, Any] | None = None
    ) -> None:
        """Write a folder in DeepSpeed's layout, complete or not at all. Every rank calls it.

        What was at ``path`` before stays until all ranks have written. With a filter for the model and no optimizer in
        ``state``, and for a model that was set up without one, it is a single file instead, through ``checkpoint_io``,
        with the whole of the weights that are kept.

        Args:
            path: a local folder that all ranks see. Other files in it stay.
            state: one model that was set up, and what goes with it.
            storage_options: there are none.
            filter: at stage 3, the model's is called with tensors that have shape and dtype, and no memory.

        Raises:
            TypeError: ``storage_options`` were given.
            ValueError: not one engine, or a filter drops weights that the optimizer trains.
            NotImplementedError: a filter for the optimizer, a store, or a way of writing that cannot be undone.
            OSError, CheckpointError: on all ranks, if one of them failed.
        """
        ranks = ranks_of()
        path = ranks.broadcast(path)
        if storage_options is not None:
            raise InvalidTypeError(
                f"{type(self).__name__} has no storage options, got {storage_options!r}. Leave them out."
            )
        failed = f"{os.fspath(path)!r} was not written"
        request = together(ranks, lambda: _SaveRequest(state, filter or {}), failed)
        values = together(ranks, lambda: self._values(request), failed)
        if request.keeps_alone:
            self._save_file(path, request, values, ranks, failed)
            return
        together(ranks, lambda: self._check_writer(request.named), failed)
        files = EngineFiles(request.named.engine, self.exclude_frozen_parameters)
        files.drop(request.dropped)
        files.add_values(request.named, values)
        write_engine(path, files, ranks)

    def _values(self, request: _SaveRequest) -> dict[str, Any]:
        """What is stored beside the engine."""
        return collect_state(
            request.named.others,
            {key: keep for key, keep in request.filter.items() if key in request.named.others},
            module_state=super().get_module_state_dict,
            optimizer_state=super().get_optimizer_state,
        )

    def _check_writer(self, named: NamedEngine) -> None:
        refuse_other_writers(named.engine)
        io = self.checkpoint_io
        if type(io) is not TorchCheckpointIO:
            raise UnsupportedError(
                f"{type(io).__name__} writes the checkpoint of one process, and here all processes write, in "
                "DeepSpeed's layout. Leave it out; or write the weights alone through it, with "
                'filter={"model": lambda key, value: True} and without the optimizer.'
            )

    def _save_file(self, path: Path, request: _SaveRequest, values: dict[str, Any], ranks: Ranks, failed: str) -> None:
        weights = gather_weights(request.named.engine, request.kept)
        content: dict[str, Any] = {str(request.named.module): weights, **values}
        io = self.checkpoint_io
        together(ranks, lambda: write_checkpoint(io, path, content) if ranks.rank == 0 else None, failed)

    def load_checkpoint(
        self, path: Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load into the engine what ``state`` asks for, whatever strategy wrote the checkpoint. Every rank calls it.

        A folder of DeepSpeed loads at every stage and on every number of processes, the optimizer's state included.
        The weights that the optimizer steps are set along with the module's, so that the next step goes on from them.

        Raises:
            FileNotFoundError: no checkpoint is there; the message says what is, and what to pass.
            CheckpointKeyError: names or keys that differ; nothing was changed.
            CheckpointError: it is damaged, does not fit, or its optimizer's state is of another kind.
            UnsafeCheckpointError: reading it would run code.
        """
        ranks = ranks_of()
        path = ranks.broadcast(path)
        alone = engine_of(state) if isinstance(state, nn.Module | Optimizer) else None
        named = find_engine(state) if isinstance(state, dict) else None
        if named is None and alone is None:
            self._explain(path, ranks)
            return super().load_checkpoint(path, state, strict, weights_only)
        if named is None:
            is_module = isinstance(state, nn.Module)
            named = NamedEngine(alone, "model" if is_module else None, None if is_module else "optimizer", {})
        request = named
        with ExitStack() as stack:

            def prepared() -> EngineLoading:
                source, saved = stack.enter_context(self._opened(path, request, weights_only, ranks))
                objects = state if isinstance(state, dict) else {}
                loading = EngineLoading(source, saved, request, objects, strict, self.exclude_frozen_parameters)
                if isinstance(state, dict):
                    loading.prepare(path)
                elif request.module is not None:
                    loading.prepare_weights(bare_state(source, path, is_optimizer=False), "The checkpoint's content")
                else:
                    loading.prepare_optimizer(bare_state(source, path, is_optimizer=True), "The checkpoint's content")
                return loading

            rest = together(ranks, prepared, f"Nothing was loaded from {os.fspath(path)!r}").run()
            return rest if isinstance(state, dict) else {}

    @contextmanager
    def _opened(
        self, path: Path, named: NamedEngine, weights_only: bool | None, ranks: Ranks
    ) -> Iterator[tuple[OpenCheckpoint, SavedEngine | None]]:
        """The checkpoint; and what DeepSpeed saved, if it is DeepSpeed's."""
        if is_remote(path) or not ranks.broadcast(_is_of_deepspeed(path)):
            with opened(self.checkpoint_io, path, weights_only, ranks, spare=True) as source:
                yield source, None
            return
        saved = together(ranks, lambda: SavedEngine(resolve(path), weights_only), f"{os.fspath(path)!r} was not opened")
        content = saved.content(named.module or "model", named.optimizer or "optimizer")
        yield ForeignCheckpoint(content), saved

    def _explain(self, path: Path, ranks: Ranks) -> None:
        """``FileNotFoundError`` for one of the files inside a checkpoint."""
        owner = ranks.broadcast(None if is_remote(path) else mistaken_file(resolve(path)))
        if owner is not None:
            raise FileNotFoundError(f"{os.fspath(path)!r} is one file of the checkpoint {owner!r}: pass that folder.")

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The module's whole state dict, keys without any wrapper's prefix. Every rank calls it.

        At stage 3 parameters are gathered one by one: copies in host memory on rank 0, ``{}`` on the others. At other
        stages every rank gets the live tensors.
        """
        engine = engine_of(module)
        return super().get_module_state_dict(module) if engine is None else gather_weights(engine)

    def load_module_state_dict(self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Put a whole state dict into the module, and into the weights that its optimizer steps. Every rank calls it.

        Args:
            module: an engine, or the module inside one.
            state_dict: the same on every rank, with keys as ``get_module_state_dict`` gives them.
            strict: the keys must agree.

        Raises:
            CheckpointKeyError: keys that differ; nothing was changed.
            CheckpointError: shapes that differ; nothing was changed.
        """
        engine = engine_of(module)
        if engine is None:
            super().load_module_state_dict(module, state_dict, strict)
            return
        saved = clean_keys(state_dict)
        check_weights(engine, saved, strict, (), "The state dict")
        load_weights(engine, saved, lambda value: value)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state by the names of parameters. Every rank calls it.

        Gathered to host memory on rank 0, ``{}`` on the others. With stage 0 it is what the optimizer itself gives, on
        every rank.
        """
        engine = engine_of(optimizer)
        return super().get_optimizer_state(optimizer) if engine is None else gather_state(engine)


class _SaveRequest:
    """What is to be saved, checked.

    Attributes:
        named: the engine and what goes with it.
        filter: functions by name.
        dropped: the entries of the module's state that its filter leaves out.
        kept: all others.
    """

    def __init__(self, state: dict[str, Any], filter: dict[str, Keep]) -> None:
        validate_filter(state, filter)
        self.named, self.filter = the_engine(state), filter
        if self.named.optimizer in filter:
            raise UnsupportedError(
                f"filter[{self.named.optimizer!r}]: DeepSpeed keeps the optimizer's state of many parameters in one "
                "flat tensor, and saves it whole. Leave the filter out, or leave the optimizer out of the state."
            )
        if self.keeps_alone and self.named.engine.has_moe_layers:
            raise UnsupportedError(
                "The model is a mixture of experts, of which each rank has some: they cannot be saved as one file. "
                "Leave the filter out; DeepSpeed's layout holds them all."
            )
        entries = live_state(self.named.engine)
        keep = filter.get(self.named.module or "")
        self.kept = {key for key, value in entries.items() if keep is None or keep(key, _outline(value))}
        self.dropped = entries.keys() - self.kept
        trained = [key for key in entries if key in self.dropped and getattr(entries[key], "requires_grad", False)]
        if trained and not self.keeps_alone:
            raise InvalidArgumentError(
                f"filter[{self.named.module!r}] leaves out {', '.join(map(repr, trained))}, which the optimizer "
                "trains: their float32 weights are part of its state, and are saved with it. Let the filter keep them, "
                f"or leave {self.named.optimizer!r} out of the state."
            )

    @property
    def keeps_alone(self) -> bool:
        """Whether it is about weights and nothing that belongs to an optimizer."""
        trained = self.named.engine.__dict__.get("basic_optimizer") is not None
        return not trained or (self.named.module in self.filter and self.named.optimizer is None)


def _outline(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(shape_of(value), dtype=value.dtype, device="meta") if is_split(value) else value.detach()


def _is_of_deepspeed(path: Path) -> bool:
    """Whether it is one of DeepSpeed's checkpoints, or what people pass in its place."""
    if is_sharded(path):
        return False  # it may have tags of DeepSpeed's beside it
    local = resolve(path)
    folder = find_folder(path, LAYOUT)
    return mistaken_file(local) is not None or (folder is not None and claims(folder))


def bare_state(source: OpenCheckpoint, path: Path, *, is_optimizer: bool) -> Any:
    """The state of the one object that a checkpoint is for; in a folder it has a name.

    ``CheckpointError`` if several could be meant.
    """
    content = source.content
    if not source.is_folder:
        return content
    others = source.rest(())
    states = {key: value for key, value in content.items() if key not in others and isinstance(value, Mapping)}
    matching = [key for key, value in states.items() if ("param_groups" in value) == is_optimizer]
    if len(matching) == 1:
        return states[matching[0]]
    raise CheckpointError(
        f"{os.fspath(path)!r} holds {', '.join(map(repr, content)) or 'nothing'}, and which of it is meant cannot be "
        "told. Name it: fabric.load(path, {name: object})."
    )
