"""What DeepSpeed has saved of one engine, put together from the files of all ranks without loading their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.streams import StreamedTensor, streamed
from fabric_core.checkpoint.lazy import is_plain_tensor
from fabric_core.checkpoint.portable import clean_name
from fabric_core.checkpoint.tree import replaced
from fabric_core.errors import CheckpointError, UnsupportedError
from fabric_deepspeed.checkpoint.files import Scaler, read_file
from fabric_deepspeed.checkpoint.layout import MODEL_SUFFIX, OPTIMIZER_SUFFIX, rank_of, tag_folder
from fabric_deepspeed.checkpoint.optimizer_files import OptimizerFiles
from fabric_deepspeed.checkpoint.partitions import Piece, Places, pieces_of

ENTRY: Final = "fabric"
"""Where Fabric says, among the client state, by which names the user knows what."""
FORMAT: Final = 1
COUNTERS: Final = ("global_steps", "global_samples", "skipped_steps")
_OF_DEEPSPEED: Final = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
        *("shared_params", "lr_scheduler", "data_sampler", "random_ltd", *COUNTERS, "dp_world_size", "mp_world_size"),
        *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "num_experts", "universal_checkpoint_info"),
        *("sparse_tensor_module_names", "csr_tensor_module_names", "ds_autoep_layers", "autoep_layers"),
    }
)


class SavedEngine:
    """One checkpoint. Tensors in it are read when they are wanted.

    Attributes:
        path: the folder with the files.
        world_size: how many ranks wrote.
    """

    def __init__(self, path: str, weights_only: bool | None) -> None:
        self.path, self._weights_only = tag_folder(path), weights_only
        names = sorted(os.listdir(self.path))
        self._model_files = _by_rank(names, MODEL_SUFFIX)
        self._optimizer_files = _by_rank(names, OPTIMIZER_SUFFIX)
        self._refuse_other_parallelism(names)
        self._first = self._read_model(0)
        self.world_size = int(self._first.get("dp_world_size", 1))
        entry = self._first.get(ENTRY)
        self._entry: Mapping[str, Any] = entry if isinstance(entry, Mapping) and "format" in entry else {}
        if int(self._entry.get("format", FORMAT)) > FORMAT:
            raise CheckpointError(
                f"{self.path!r} was written by a newer fabric-deepspeed: pip install --upgrade fabric-deepspeed"
            )

    def content(self, module_name: str = "model", optimizer_name: str = "optimizer") -> dict[str, Any]:
        """All of it by the user's names. The names given serve where the checkpoint holds none."""
        optimizer = self.optimizer
        content: dict[str, Any] = {self._entry.get("module", module_name): self.weights}
        if optimizer is not None:
            content[self._entry.get("optimizer") or optimizer_name] = optimizer
        return {**content, **self.values}

    @cached_property
    def values(self) -> dict[str, Any]:
        """What else the user has saved: rank 0's, in memory."""
        if self._entry:
            own = {key: self._first[key] for key in self._entry["keys"] if key in self._first}
            values = {**own, **self._entry["values"]}
        else:
            values = {key: value for key, value in self._first.items() if key not in _OF_DEEPSPEED}
            scheduler = self._first.get("lr_scheduler")
            values = values if scheduler is None else {"lr_scheduler": scheduler, **values}
        result: dict[str, Any] = copied(values)
        return result

    @property
    def written_by(self) -> str | None:
        """DeepSpeed's release, and whether Fabric used it."""
        release = self._first.get("ds_version")
        if not isinstance(release, str):
            return None
        return f"DeepSpeed {release}, by Fabric" if self._entry else f"DeepSpeed {release}"

    @property
    def counters(self) -> dict[str, int]:
        """How far the engine had come."""
        return {name: int(self._first[name]) for name in COUNTERS if name in self._first}

    @property
    def scaler(self) -> Scaler | None:
        """The state of the loss scaler, where the files hold one."""
        return None if self._optimizer is None else self._optimizer.scaler

    @cached_property
    def weights(self) -> dict[str, Any]:
        """The module's state in its own order: float32 where the optimizer holds the parameter, else as saved.

        Tied parameters are the same object. What modules add to their tensors is as it was saved.
        """
        tied = self._first.get("shared_params") or {}
        masters = {} if self._optimizer is None else self._optimizer.masters
        frozen = self._frozen
        buffers = set(self._first.get("buffer_names") or ())
        same: dict[object, StreamedTensor] = {}
        weights: dict[str, Any] = {}
        for name, value in self._module.items():
            source, clean = tied.get(name, name), clean_name(name)
            if source in masters:
                weights[clean] = masters[source]
            elif source in frozen:
                weights[clean] = frozen[source]
            else:
                weights[clean] = _streamed_once(value, same, whole=name in buffers)
        return weights

    @cached_property
    def optimizer(self) -> dict[str, Any] | None:
        """The optimizer's state by the names of parameters; ``None`` where ``why_no_optimizer`` says why."""
        if self._optimizer is not None:
            return self._optimizer.state
        state = self._first.get("optimizer")
        if not isinstance(state, Mapping) or "param_groups" not in state:
            return None
        same: dict[object, StreamedTensor] = {}  # a stage without partitions: as the optimizer itself gave it
        streams: dict[str, Any] = replaced(
            _by_name(dict(state), self._entry.get("parameters")),
            lambda leaf: copied(leaf) if _is_number(leaf) else _streamed_once(leaf, same),
        )
        return streams

    @property
    def raw_optimizer(self) -> Any:
        """What the engine's optimizer gave as its state, where a single rank has written it."""
        return self._first.get("optimizer")

    @property
    def why_no_optimizer(self) -> str:
        """Why there is no state of the optimizer by names."""
        if self._optimizer is not None:
            return self._optimizer.why_no_state
        if self._first.get("optimizer") is not None:
            return "stage 0 in 16 bits stores it in a form that only the same kind of engine reads"
        return "none was saved"

    @property
    def _module(self) -> Mapping[str, Any]:
        module = self._first.get("module")
        if not isinstance(module, Mapping):
            raise CheckpointError(f"{self.path!r} is damaged: its files hold no module.")
        return module

    @cached_property
    def _optimizer(self) -> OptimizerFiles | None:
        """The files of all ranks; ``None`` at a stage without partitions."""
        shapes = self._first.get("param_shapes")
        if shapes is None or (not self._optimizer_files and self._has_no_partitions):
            return None
        missing = [rank for rank in range(self.world_size) if rank not in self._optimizer_files]
        if missing:
            raise CheckpointError(
                f"{self.path!r} is incomplete: {self.world_size} ranks wrote it, and the files *{OPTIMIZER_SUFFIX} of "
                f"ranks {', '.join(map(str, missing))} are missing."
            )
        contents = [self._read(self._optimizer_files[rank]) for rank in range(self.world_size)]
        return OptimizerFiles(contents, shapes, self.path)

    @property
    def _has_no_partitions(self) -> bool:
        """Whether the optimizer was one without partitions: releases before 0.19 list shapes even so."""
        stage = (self._first.get("ds_config") or {}).get("zero_optimization", {}).get("stage", 0)
        return self._first.get("optimizer") is not None or int(stage) == 0

    @cached_property
    def _frozen(self) -> dict[str, StreamedTensor]:
        """Parameters that no optimizer holds, where they are in parts."""
        shapes = self._first.get("frozen_param_shapes")
        if not shapes or len(self._model_files) < 2:
            return {}  # they are in the module's state
        parts = [self._read_model(rank)["frozen_param_fragments"] for rank in range(self.world_size)]
        names = list(shapes)
        pieces: dict[str, list[Piece]] = {
            name: list(pieces_of(shape.numel(), self.world_size, flat, 0))
            for flat, (name, shape) in enumerate(shapes.items())
        }
        places = Places(dict(shapes), [[name] for name in names], pieces)
        memory = [{flat: part[name] for flat, name in enumerate(names)} for part in parts]
        return {name: places.stream(name, memory) for name in names}

    def _read_model(self, rank: int) -> dict[str, Any]:
        if rank not in self._model_files:
            raise CheckpointError(f"{self.path!r} is incomplete: the file *{MODEL_SUFFIX} of rank {rank} is missing.")
        return self._read(self._model_files[rank])

    def _read(self, name: str) -> dict[str, Any]:
        return read_file(os.path.join(self.path, name), self._weights_only)

    def _refuse_other_parallelism(self, names: list[str]) -> None:
        what = ""
        if any("expert_" in name or name.startswith("expp_") for name in names):
            what = "a mixture of experts, each in a file of its own"
        elif any("mp_rank_" in name and "mp_rank_00" not in name for name in names):
            what = "a model that was split by layers or within layers"
        elif "offloaded_tensors" in names:
            what = "an optimizer that was offloaded to NVMe, in files of its own"
        if what:
            raise UnsupportedError(
                f"{self.path!r} is of {what}. Only DeepSpeed itself reads that: engine.load_checkpoint(...) with the "
                "same number of processes, or its ds_to_universal program."
            )


def _by_name(state: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The state of an optimizer by names, where Fabric has stored them; else by the numbers that it has."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if names is None or len(names) != len(numbers):
        return state
    named = dict(zip(numbers, names, strict=True))
    groups = [{**group, "params": [named[number] for number in group["params"]]} for group in state["param_groups"]]
    entries = {named.get(number, number): entry for number, entry in state["state"].items()}
    return {**state, "state": entries, "param_groups": groups}


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 0  # a step, which is counted up in place


def _by_rank(names: list[str], suffix: str) -> dict[int, str]:
    return {rank_of(name) or 0: name for name in names if name.endswith(suffix)}


def _streamed_once(value: Any, same: dict[object, StreamedTensor], whole: bool = False) -> Any:
    """A tensor as a stream, the same one for the same memory; ``whole`` for float32 in the place of 16 bits."""
    if not isinstance(value, Tensor) or not is_plain_tensor(value):
        return copied(value)
    memory = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
    stream = same.setdefault(memory, streamed(value.detach()))
    if whole and value.is_floating_point() and value.element_size() < 4:
        return stream.to(torch.float32)
    return stream


def copied(tree: Any) -> Any:
    """``tree`` with copies of its tensors: those from a file are windows on it."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf.detach().clone()
        return torch.nn.Parameter(own, leaf.requires_grad) if isinstance(leaf, torch.nn.Parameter) else own

    return replaced(tree, copy)
