"""The state of an engine's optimizer by the names of parameters, into the engine and out of it.

Stages 1 to 3 keep it in flat tensors, of which each rank has a share. By names, it fits every stage and number of
processes, and other strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fabric_core.checkpoint.portable import clean_name
from fabric_core.errors import CheckpointError, CheckpointKeyError
from fabric_deepspeed.checkpoint.live import FlatOptimizer, flat_optimizer, live_state, shape_of
from fabric_deepspeed.engine import Engine

Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Match:
    """What of a stored optimizer belongs where.

    Attributes:
        ids: the stored key of each live parameter, by name.
        groups: the options for each live parameter group; ``None`` keeps what it has.
        state: what is stored, by stored key.
    """

    ids: dict[str, Any]
    groups: list[dict[str, Any] | None]
    state: Mapping[Any, Mapping[str, Any]]


def match_state(optimizer: FlatOptimizer, saved: Any, strict: bool, name: str) -> Match:
    """Decide what of ``saved`` belongs to which parameter, by names, or by the order where it numbers them.

    Raises:
        CheckpointKeyError: parameters that differ, if ``strict``; all of them are named.
        CheckpointError: other parameter groups, or no state of an optimizer at all.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("param_groups"), list):
        raise CheckpointError(f"{name} is not the state of an optimizer in the checkpoint.")
    groups = saved["param_groups"]
    stored = [id_ for group in groups for id_ in group["params"]]
    if all(isinstance(id_, str) for id_ in stored):
        by_name = {clean_name(id_): id_ for id_ in stored}
    else:
        by_name = _by_order(optimizer, groups, name)
    live = [parameter for group in optimizer.groups for parameter in group]
    ids = {parameter: by_name[parameter] for parameter in live if parameter in by_name}
    if strict:
        _check_names(live, list(by_name), name)
    origin = {id_: index for index, group in enumerate(groups) for id_ in group["params"]}
    options = [_options(group, ids, origin, groups, strict, name) for group in optimizer.groups]
    return Match(ids, options, saved.get("state", {}))


def _by_order(optimizer: FlatOptimizer, groups: list[Mapping[str, Any]], name: str) -> dict[str, Any]:
    have, stored = [len(group) for group in optimizer.groups], [len(group["params"]) for group in groups]
    if have != stored:
        raise CheckpointError(
            f"{name}: the checkpoint numbers the parameters, in groups of {stored}, and this optimizer trains groups "
            f"of {have}. Nothing was loaded. Create the optimizer from the same parameters as when it was saved, of "
            "which DeepSpeed leaves out those that are frozen; or load without the optimizer."
        )
    pairs = zip(optimizer.groups, groups, strict=True)
    return {parameter: id_ for own, group in pairs for parameter, id_ in zip(own, group["params"], strict=True)}


def _check_names(live: list[str], stored: list[str], name: str) -> None:
    missing = [parameter for parameter in live if parameter not in stored]
    unexpected = [parameter for parameter in stored if parameter not in live]
    problems = [f"Missing in the checkpoint: {', '.join(missing)}"] if missing else []
    problems += [f"Unknown to the optimizer: {', '.join(unexpected)}"] if unexpected else []
    if problems:
        raise CheckpointKeyError(
            f"{name} does not fit the optimizer. Nothing was loaded. {'. '.join(problems)}. Create the optimizer from "
            "the same parameters as when it was saved, or pass strict=False to load what both have."
        )


def _options(
    group: list[str],
    ids: Mapping[str, Any],
    origin: Mapping[Any, int],
    groups: list[Mapping[str, Any]],
    strict: bool,
    name: str,
) -> dict[str, Any] | None:
    """The options of the stored group that the parameters of a live group were in."""
    origins = sorted({origin[ids[parameter]] for parameter in group if parameter in ids})
    candidates = [{key: value for key, value in groups[index].items() if key not in _LISTS} for index in origins]
    if candidates and all(other == candidates[0] for other in candidates):
        return candidates[0]
    if strict and candidates:
        raise CheckpointError(
            f"{name}: the parameters of one group were in groups {origins} of different options. Nothing was loaded. "
            "Make the groups as they were when it was saved, or pass strict=False to keep the options that there are."
        )
    return None


_LISTS = ("params", "param_names")


@torch.no_grad()
def load_state(engine: Engine, optimizer: FlatOptimizer, match: Match, read: Read) -> None:
    """Put the state into this rank's share of the flat tensors. Every rank calls it.

    Args:
        engine: the engine.
        optimizer: its optimizer.
        match: what belongs where.
        read: brings a stored tensor to host memory; called on all ranks in the same order.
    """
    shapes = {name: shape_of(value) for name, value in live_state(engine).items() if isinstance(value, Tensor)}
    for names, numbers in zip(optimizer.groups, optimizer.flats_of, strict=True):
        entries = {name: match.state.get(match.ids[name], {}) for name in names if name in match.ids}
        if entries:
            _forget_others(optimizer, numbers, {key for entry in entries.values() for key in entry})
        for name, entry in entries.items():
            fragment = optimizer.fragments.get(name)
            for key, stored in entry.items():
                value = read(stored)
                if isinstance(value, Tensor) and value.dim() and value.shape == shapes[name]:
                    if fragment is not None:
                        fragment.put(value, optimizer.memory(fragment.flat, key, value.dtype))
                else:
                    for number in numbers:
                        _set_value(optimizer, number, key, value)
    for group, options in zip(optimizer.base.param_groups, match.groups, strict=True):
        group.update(options or {})
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed looks for the new tensors at the next step


def _forget_others(optimizer: FlatOptimizer, numbers: list[int], keys: set[str]) -> None:
    for number in numbers:
        for key in optimizer.state(number).keys() - keys:
            optimizer.forget(number, key)


def _set_value(optimizer: FlatOptimizer, number: int, key: str, value: Any) -> None:
    """What is one value for all parameters, as a step: a tensor or a number, as this optimizer has it."""
    before = optimizer.state(number).get(key)
    wants_tensor = isinstance(before, Tensor) if before is not None else isinstance(value, Tensor)
    if before is None and key == "step":
        wants_tensor = type(optimizer.base).__module__.startswith("torch.")
    if wants_tensor:
        value = value.clone() if isinstance(value, Tensor) else torch.tensor(float(value))
    else:
        value = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
        value = int(value) if key == "step" else value
    optimizer.set(number, key, value)


@torch.no_grad()
def gather_state(engine: Engine) -> dict[str, Any]:
    """The optimizer's state by names with whole tensors, in host memory of rank 0; ``{}`` elsewhere.

    Every rank calls it. With stage 0, what the optimizer itself gives, on every rank.
    """
    optimizer = flat_optimizer(engine)
    if optimizer is None:
        state: dict[str, Any] = engine.basic_optimizer.state_dict()
        return state
    shapes = {name: shape_of(value) for name, value in live_state(engine).items() if isinstance(value, Tensor)}
    is_first = torch.distributed.get_rank() == 0
    result: dict[str, dict[str, Any]] = {}
    for names, numbers in zip(optimizer.groups, optimizer.flats_of, strict=True):
        number_of = _flat_of_each(engine, optimizer, names, numbers)
        for name in names:
            flat, entries = optimizer.weights(number_of[name]), optimizer.state(number_of[name])
            whole = {key: _whole(optimizer, name, value, shapes[name], flat, engine) for key, value in entries.items()}
            if is_first and whole:
                result[name] = whole
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.base.param_groups]
    groups = [{**own, "params": names} for own, names in zip(options, optimizer.groups, strict=True)]
    return {"state": result, "param_groups": groups} if is_first else {}


def _flat_of_each(engine: Engine, optimizer: FlatOptimizer, names: list[str], numbers: list[int]) -> dict[str, int]:
    """The number of the flat tensor that each parameter is in, also where this rank has none of it."""
    return {name: found.flat if (found := optimizer.fragments.get(name)) else numbers[0] for name in names}


def _whole(optimizer: FlatOptimizer, name: str, value: Any, shape: torch.Size, flat: Tensor, engine: Engine) -> Any:
    if not isinstance(value, Tensor) or value.shape != flat.shape:
        return value.clone() if isinstance(value, Tensor) else value
    whole = torch.zeros(shape, dtype=value.dtype, device=engine.device)
    fragment = optimizer.fragments.get(name)
    if fragment is not None:
        fragment.get(value, whole)
    torch.distributed.all_reduce(whole)  # all others have zeros
    return whole.cpu()
