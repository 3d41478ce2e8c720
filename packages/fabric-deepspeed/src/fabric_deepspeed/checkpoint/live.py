"""A live engine's parameters, and where the optimizer keeps this rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fabric_core.checkpoint.portable import clean_name
from fabric_deepspeed.backend import kept_elsewhere
from fabric_deepspeed.checkpoint.partitions import offsets, overlap, partition_length
from fabric_deepspeed.checkpoint.swapped import SwappedFlat, swapped_flats
from fabric_deepspeed.engine import Engine


@dataclass(frozen=True)
class Fragment:
    """This rank's elements of a parameter in the optimizer's flat memory.

    Attributes:
        flat: number of the flat tensor.
        start: first element there.
        first: first element in the parameter.
        length: how many.
    """

    flat: int
    start: int
    first: int
    length: int

    def put(self, value: Tensor, memory: Tensor) -> None:
        """Copy this rank's elements of the whole ``value`` to the flat tensor ``memory``."""
        memory[self.start : self.start + self.length].copy_(value.reshape(-1)[self.first : self.first + self.length])

    def get(self, memory: Tensor, whole: Tensor) -> None:
        """Copy them from the flat tensor to their place in the contiguous ``whole``."""
        whole.view(-1)[self.first : self.first + self.length].copy_(memory[self.start : self.start + self.length])


@dataclass(frozen=True)
class FlatOptimizer:
    """The optimizer of an engine that keeps the weights it steps in flat tensors, of which each rank has a share.

    Attributes:
        base: the optimizer that steps them, with its state by flat tensor.
        keys: the flat tensors, as the optimizer has its state by them; those on NVMe are empty.
        groups: for each parameter group, the names of its parameters; the same on all ranks.
        flats_of: for each parameter group, the numbers of its flat tensors.
        fragments: by name; parameters of which this rank has nothing are not there.
        swapped: the flat tensors that are on NVMe, by their numbers.
    """

    base: torch.optim.Optimizer
    keys: list[Tensor]
    groups: list[list[str]]
    flats_of: list[list[int]]
    fragments: dict[str, Fragment] = field(repr=False)
    swapped: dict[int, SwappedFlat] = field(default_factory=dict, repr=False)

    def weights(self, number: int) -> Tensor:
        """The float32 weights in a flat tensor: on the device, on the CPU or in a file."""
        return self.swapped[number].weights if number in self.swapped else self.keys[number].detach()

    def state(self, number: int) -> dict[str, Any]:
        """The optimizer's state of a flat tensor; its tensors can be written to, and other values are copies."""
        state = self.base.state.get(self.keys[number], {})
        return {**state, **self.swapped[number].state} if number in self.swapped else dict(state)

    def set(self, number: int, key: str, value: Any) -> None:
        """Set an entry of that state that is no flat tensor."""
        self.base.state[self.keys[number]][key] = value

    def memory(self, number: int, key: str, dtype: torch.dtype) -> Tensor:
        """A flat tensor of that state, made where the optimizer has not stepped yet."""
        memory = self.state(number).get(key)
        if isinstance(memory, Tensor):
            return memory
        if number in self.swapped:
            return self.swapped[number].add(key)
        memory = torch.zeros_like(self.keys[number], dtype=dtype, requires_grad=False)
        self.set(number, key, memory)
        return memory

    def forget(self, number: int, key: str) -> None:
        """Remove an entry of that state; beside memory on NVMe, which stays, it becomes zero."""
        state = self.base.state[self.keys[number]]
        if number not in self.swapped or not self.swapped[number].state:
            del state[key]
        elif isinstance(value := self.state(number)[key], Tensor):
            value.zero_()
        elif isinstance(value, int | float):
            state[key] = type(value)(0)


def names_of(engine: Engine) -> dict[nn.Parameter, str]:
    """Every parameter with its first name, without what wrappers inside the module add to it."""
    return {parameter: clean_name(name) for name, parameter in engine.module.named_parameters()}


def live_state(engine: Engine) -> dict[str, Any]:
    """The module's state by clean names, with the parameters themselves."""
    state: Mapping[str, Any] = engine.module.state_dict(keep_vars=True)
    return {clean_name(key): value for key, value in state.items()}


def is_split(value: Any) -> bool:
    """Whether a parameter is in parts, as at stage 3."""
    return hasattr(value, "ds_id")


def shape_of(value: Any) -> torch.Size:
    """A parameter's shape, also where it is in parts."""
    return torch.Size(value.ds_shape if is_split(value) else value.shape)


@contextmanager
def gathered(parameters: Sequence[Tensor], writer: int | None = None) -> Iterator[None]:
    """While entered, parameters in parts are whole. Every rank enters; what rank ``writer`` writes is kept by all."""
    from deepspeed import zero

    with ExitStack() as stack:
        # One by one: of several at once, releases before 0.19.8 wait for the last alone, and gloo has no order.
        for parameter in {id(parameter): parameter for parameter in parameters if is_split(parameter)}.values():
            stack.enter_context(zero.GatheredParameters([parameter], modifier_rank=writer))
        yield


@contextmanager
def changing(engine: Engine) -> Iterator[None]:
    """Enter it to change parameters in parts: before, none is whole; after, those are that DeepSpeed keeps so."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "checkpoint_event_prologue"):
        yield
        return
    optimizer.checkpoint_event_prologue()
    yield
    for parameter in getattr(optimizer, "persistent_parameters", ()):
        parameter.all_gather([parameter])  # one by one, as above
    optimizer.checkpoint_event_epilogue()


def flat_optimizer(engine: Engine) -> FlatOptimizer | None:
    """The engine's optimizer if it is of the kind that stages 1 to 3 use.

    ``RuntimeError`` if this release of DeepSpeed keeps its memory elsewhere than those that are known.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat") and hasattr(optimizer, "sub_group_to_group_id"):
        return _of_stage_3(engine, optimizer)
    for flats, groups in (
        ("single_partition_of_fp32_groups", "bit16_groups"),
        ("fp32_groups_flat_partition", "bf16_groups"),
    ):
        if hasattr(optimizer, flats):
            return _of_stage_1_and_2(engine, optimizer, getattr(optimizer, flats), getattr(optimizer, groups))
    if engine.zero_optimization_stage() and isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise kept_elsewhere("the weights that its optimizer steps")
    return None


def _of_stage_1_and_2(
    engine: Engine, optimizer: Any, flats: list[Tensor], groups: list[list[nn.Parameter]]
) -> FlatOptimizer:
    names = names_of(engine)
    fragments: dict[str, Fragment] = {}
    # DeepSpeed's own note of where a parameter is (_hp_mapping) is wrong if groups are laid out in another order.
    in_memory = getattr(optimizer, "round_robin_bit16_groups", groups)
    gaps = getattr(optimizer, "round_robin_bit16_padding", [None] * len(groups))
    for flat, parameters in enumerate(in_memory):
        numbers = [parameter.numel() for parameter in parameters]
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[flat])
        for parameter, first, number in zip(parameters, offsets(numbers, gaps[flat]), numbers, strict=True):
            there, here, length = overlap(first, number, flats[flat].numel(), rank)
            if length > 0:
                fragments[names[parameter]] = Fragment(flat, there, here, length)
    named = [[names[parameter] for parameter in group] for group in groups]
    return FlatOptimizer(optimizer.optimizer, flats, named, [[flat] for flat in range(len(flats))], fragments)


def _of_stage_3(engine: Engine, optimizer: Any) -> FlatOptimizer:
    names = names_of(engine)
    fragments: dict[str, Fragment] = {}
    count = 1 + max(optimizer.sub_group_to_group_id.values(), default=-1)
    groups: list[list[str]] = [[] for _ in range(count)]
    flats_of: list[list[int]] = [[] for _ in range(count)]
    for flat, parameters in enumerate(optimizer.fp16_groups):
        group = optimizer.sub_group_to_group_id[flat]
        groups[group].extend(names[parameter] for parameter in parameters)
        flats_of[group].append(flat)
        start = 0
        for parameter in parameters:
            length = partition_length(parameter.ds_numel, _ranks_of(parameter))
            first = _rank_of(parameter) * length
            own = min(length, parameter.ds_numel - first)
            if own > 0:
                fragments[names[parameter]] = Fragment(flat, start, first, own)
            start += length
    flats, swapped = optimizer.fp32_partitioned_groups_flat, swapped_flats(optimizer)
    return FlatOptimizer(optimizer.optimizer, flats, groups, flats_of, fragments, swapped)


def _rank_of(parameter: Any) -> int:
    return int(torch.distributed.get_rank(parameter.ds_process_group))


def _ranks_of(parameter: Any) -> int:
    return int(torch.distributed.get_world_size(parameter.ds_process_group))
