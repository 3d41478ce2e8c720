"""Memory and first values for what was built on the meta device, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_core.checkpoint.dtensors import local_of
from fabric_core.module_init import children_first, own_tensors, reset_method
from fabric_core.strategies.sharded.agreement import broadcast_tensors
from fabric_core.strategies.sharded.groups import (
    fsdp_modules,
    offloads,
    parameter_groups,
    sharded_parameters,
    take_over_memory,
)
from fabric_core.strategies.sharded.places import place_of
from fabric_core.strategies.sharded.unfilled import fill, mark, marked, untouched
from fabric_core.strategies.sharded.whole import whole_tensors

Initializer = Callable[[nn.Module], object]


def materialize_unit(
    unit: nn.Module, done: Set[nn.Module], device: torch.device, init_fn: Initializer | None = None
) -> None:
    """Every tensor of ``unit`` has memory on ``device`` afterwards, and a value, or a mark that it has none.

    Tied tensors stay tied, and optimizers made on the meta device find their parameters again. Values come from the
    ``reset_parameters()`` of the sub-modules that own meta tensors, children before parents as in constructors. What
    that leaves alone is NaN (zero where the dtype has none) and marked: ``unfilled.watch`` makes an error of marks that
    nobody clears. Tensors that have memory move to ``device``.

    Every rank calls it with the same random state: see ``agreement.same_random_numbers``.

    Args:
        unit: the module.
        done: sub-modules to leave out, with all they contain: those that are sharded already.
        device: where to.
        init_fn: called with each owner of meta tensors, instead of its ``reset_parameters()``.
    """
    parts = children_first(unit, done)
    fresh = [(part, names) for part in parts if (names := _give_memory(part, device))]
    for part, names in fresh:
        _initialise(part, names, init_fn)


def materialize_sharded(module: nn.Module, device: torch.device) -> None:
    """As ``materialize_unit``, for a whole module whose parameters are split over processes already.

    Each process allocates its parts. A sub-module is initialised on whole tensors, of which each process keeps its
    part: values do not depend on the number of processes, and memory is needed for one sub-module at a time.
    """
    groups = [group for part in fsdp_modules(module) for group in parameter_groups(part)]
    offloaded = {id(p) for group in groups if offloads(group) for p in sharded_parameters(group)}
    parts = children_first(module)
    fresh = [(part, names) for part in parts if (names := _give_memory(part, device, offloaded))]
    if not fresh:
        return
    for group in groups:
        take_over_memory(group)
    for part, names in fresh:
        _initialise(part, names, None)


def broadcast_unit(unit: nn.Module, done: Set[nn.Module]) -> None:
    """Rank 0's parameters and buffers of ``unit``, without those of ``done``, on every rank. Every rank calls it.

    So do its marks of missing values: other ranks may be the only ones that built the module on the meta device.
    """
    parts = children_first(unit, done)
    tensors = {id(t): t for part in parts for _, _, t in own_tensors(part) if not isinstance(t, DTensor)}
    broadcast_tensors(list(tensors.values()))
    places = [(part, name) for part in parts for _, name, _ in own_tensors(part)]
    if not places:
        return
    device = next(iter(tensors.values())).device if tensors else None
    marks = torch.tensor([marked(part, name) for part, name in places], dtype=torch.uint8, device=device)
    broadcast_tensors([marks])
    for (part, name), missing in zip(places, marks.tolist(), strict=True):
        mark(part, name, bool(missing))


def _give_memory(part: nn.Module, device: torch.device, offloaded: Set[int] = frozenset()) -> list[str]:
    """Names of the part's own tensors that were on the meta device; a tied tensor counts at its first place."""
    fresh = []
    for _, name, tensor in own_tensors(part):
        target = torch.device("cpu") if id(tensor) in offloaded else device
        if tensor.is_meta:
            memory = torch.empty_like(tensor, device=target)
            fill(local_of(memory))
            fresh.append(name)
        elif tensor.device != target and not isinstance(tensor, DTensor):
            memory = tensor.detach().to(target)
        else:
            continue
        _move_to(tensor, memory)
    return fresh


def _move_to(tensor: Tensor, memory: Tensor) -> None:
    """Have ``memory`` stand wherever ``tensor`` does, with its class and attributes.

    A parameter whose places are known is replaced, so that an optimizer that still holds it holds no memory for that.
    All else keeps its identity, and is swapped.
    """
    memory = memory.detach().requires_grad_(tensor.requires_grad)
    if type(memory) is not type(tensor):
        memory.__class__ = type(tensor)
    memory.__dict__.update(tensor.__dict__)
    place = place_of(tensor)
    if place is not None and isinstance(memory, nn.Parameter):
        place.put(memory)
    else:
        torch.utils.swap_tensors(tensor, memory)


def _initialise(part: nn.Module, names: list[str], init_fn: Initializer | None) -> None:
    reset = partial(init_fn, part) if init_fn is not None else reset_method(part)
    if reset is None:
        for name in names:
            mark(part, name)
        return
    with torch.no_grad(), whole_tensors(part):
        versions = {name: tensor._version for _, name, tensor in own_tensors(part)}
        reset()
        for _, name, tensor in own_tensors(part):
            if name in names and untouched(tensor, versions.get(name)):
                mark(part, name)
