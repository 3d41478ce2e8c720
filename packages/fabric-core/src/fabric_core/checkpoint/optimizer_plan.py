"""Deciding what of a checkpoint belongs to which parameter of an optimizer, whatever the checkpoint calls it.

Files of single-device and ddp runs number the parameters in the order of the groups, as torch does. Sharded runs,
Lightning's too, name them. A sharded folder has text for numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.checkpoint.dtensors import empty_like
from fabric_core.checkpoint.lazy import OpenCheckpoint, is_plain_tensor
from fabric_core.checkpoint.plan import Plan, Transfer
from fabric_core.checkpoint.portable import clean_name, namings, parameters_of
from fabric_core.checkpoint.sharded.boxes import is_dtensor
from fabric_core.errors import CheckpointError, CheckpointKeyError


def plan_optimizer(
    source: OpenCheckpoint,
    optimizer: Optimizer,
    saved: Any,
    modules: Mapping[str, nn.Module],
    strict: bool,
    name: str,
) -> Plan:
    """The state to load, numbered as torch does, and what of it to read straight into the optimizer's state tensors.

    Args:
        source: where ``saved`` comes from.
        optimizer: the live one.
        saved: its state in the checkpoint.
        modules: where the parameters that the checkpoint names are looked for. If the optimizer's are in none, the
            order of the stored groups counts.
        strict: every parameter must be there, and no other. Otherwise those that are missing keep their state.
        name: for messages.

    Raises:
        CheckpointKeyError: parameters that differ; all of them are named.
        CheckpointError: other parameter groups, or no state of an optimizer at all.
    """
    saved = _unflattened(source.values(saved))
    custom = type(optimizer).load_state_dict is not Optimizer.load_state_dict or _has_pre_hooks(optimizer)
    parameters = parameters_of(optimizer)
    if custom and not any(map(is_dtensor, parameters)) and not _has_names(saved):
        return Plan(saved)  # only the code itself can tell what fits
    if not isinstance(saved, Mapping) or not isinstance(saved.get("param_groups"), list):
        raise CheckpointError(f"{name} is not the state of an optimizer in the checkpoint.")
    match = _match(optimizer, saved["param_groups"], modules, strict, name)
    stored = saved.get("state", {})
    # Keys that are no parameter's: optimizers may keep state of their own under them.
    state = {key: entries for key, entries in stored.items() if key not in match.known}
    plan = Plan({**saved, "state": state, "param_groups": match.groups})
    for number, (parameter, id_) in enumerate(zip(parameters, match.ids, strict=True)):
        live = optimizer.state.get(parameter)
        entries = live if id_ is None else stored.get(id_, stored.get(str(id_)))
        if not isinstance(entries, Mapping):
            if entries is not None:
                state[number] = entries
            continue
        state[number] = own = dict(entries)
        if id_ is not None:
            plan.transfers.extend(_transfers(source, own, parameter, None if custom else live))
    return plan


@dataclass
class _Match:
    """Attributes: the checkpoint's key for each live parameter, the groups to load, and every key there is."""

    ids: list[Any]
    groups: list[dict[str, Any]]
    known: set[Any]


def _match(
    optimizer: Optimizer, saved: list[dict[str, Any]], modules: Mapping[str, nn.Module], strict: bool, name: str
) -> _Match:
    ids = [id_ for group in saved for id_ in group.get("params", ())]
    known = {*ids, *map(str, ids)}
    parameters = parameters_of(optimizer)
    naming = _naming(ids, parameters, modules)
    if naming is None:
        _check_sizes(optimizer, saved, name)
        options = saved
    else:
        by_parameter = {id(naming[clean]): id_ for id_ in ids if (clean := clean_name(id_)) in naming}
        ids_found = [by_parameter.get(id(parameter)) for parameter in parameters]
        if strict:
            _check_names(optimizer, ids, ids_found, naming, name)
        ids = ids_found
        options = _options(optimizer, saved, ids, strict, name)
    groups, first = [], 0
    for live, group in zip(optimizer.param_groups, options, strict=True):
        last = first + len(live["params"])
        names = {"param_names": live["param_names"]} if "param_names" in live else {}
        kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**kept, **names, "params": list(range(first, last))})
        first = last
    return _Match(ids, groups, known)


def _naming(ids: list[Any], parameters: list[Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Tensor] | None:
    """The live parameters by the names that the checkpoint uses; ``None`` if it numbers them, or nobody names them."""
    if not ids or not all(isinstance(id_, str) for id_ in ids):
        return None
    own = set(map(id, parameters))
    best: dict[str, Tensor] | None = None
    for naming in namings(modules):
        mine = {name: parameter for name, parameter in naming.items() if id(parameter) in own}
        if len(set(map(id, mine.values()))) < len(own):
            continue
        hits = sum(clean_name(id_) in mine for id_ in ids)
        if best is None or hits > sum(clean_name(id_) in best for id_ in ids):
            best = mine
    return best


def _check_sizes(optimizer: Optimizer, saved: list[dict[str, Any]], name: str) -> None:
    have = [len(group["params"]) for group in optimizer.param_groups]
    stored = [len(group.get("params", ())) for group in saved]
    if have != stored:
        raise CheckpointError(
            f"{name}: the checkpoint has parameter groups of {stored} parameters, {type(optimizer).__name__} has "
            f"{have}. Nothing was loaded. Create the optimizer from the same parameters as when it was saved."
        )


def _check_names(
    optimizer: Optimizer, ids: list[str], found: list[str | None], naming: dict[str, Tensor], name: str
) -> None:
    names = {id(parameter): own for own, parameter in reversed(naming.items())}
    missing = [names[id(p)] for p, id_ in zip(parameters_of(optimizer), found, strict=True) if id_ is None]
    unexpected = [id_ for id_ in ids if clean_name(id_) not in naming]
    problems = [f"Missing in the checkpoint: {', '.join(missing)}"] if missing else []
    problems += [f"Unknown to the optimizer: {', '.join(unexpected)}"] if unexpected else []
    if problems:
        raise CheckpointKeyError(
            f"{name} does not fit {type(optimizer).__name__}. Nothing was loaded. {'. '.join(problems)}. Create the "
            "optimizer from the same parameters as when it was saved, or pass strict=False to load what both have."
        )


def _options(
    optimizer: Optimizer, saved: list[dict[str, Any]], ids: list[Any], strict: bool, name: str
) -> list[dict[str, Any]]:
    """For each live group the stored one that its parameters were in."""
    origin = {id_: index for index, group in enumerate(saved) for id_ in group.get("params", ())}
    result, first = [], 0
    for position, live in enumerate(optimizer.param_groups):
        last = first + len(live["params"])
        origins = {origin[id_]: None for id_ in ids[first:last] if id_ is not None}
        candidates = [_without_params(saved[index]) for index in origins]
        if candidates and all(other == candidates[0] for other in candidates):
            result.append(candidates[0])
        elif not candidates and position < len(saved) and not live["params"]:
            result.append(_without_params(saved[position]))
        elif strict:
            raise CheckpointError(
                f"{name}: the parameters of group {position} of {type(optimizer).__name__} were in groups "
                f"{sorted(origins)} of different options. Nothing was loaded. Make the groups as they were when it was "
                "saved, or pass strict=False to keep the options that this group has."
            )
        else:
            result.append(_without_params(live))
        first = last
    return result


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _transfers(source: OpenCheckpoint, entries: Any, parameter: Tensor, live: Any) -> Iterator[Transfer]:
    """What of a parameter's state has a place; ``entries`` may be nested."""
    items = list(entries.items() if isinstance(entries, dict) else enumerate(entries))
    for key, window in items:
        own = _entry(live, key)
        if isinstance(window, dict | list):
            entries[key] = inner = window.copy()
            yield from _transfers(source, inner, parameter, own)
        elif isinstance(window, Tensor):
            place = _place(source, parameter, key, window, own)
            if place is not None:
                yield Transfer(entries, key, window, place)


def _entry(live: Any, key: Any) -> Any:
    if isinstance(live, Mapping):
        return live.get(key)
    return live[key] if isinstance(live, list) and isinstance(key, int) and key < len(live) else None


def _place(source: OpenCheckpoint, parameter: Tensor, key: Any, window: Tensor, live: Any) -> Tensor | None:
    """The memory that a state tensor belongs in; ``None`` if loading itself will find or make it."""
    usable = (
        (is_plain_tensor(live) or is_dtensor(live))
        and not live.requires_grad
        and (live.shape, live.dtype) == (window.shape, window.dtype)
        and live.device.type != "meta"
    )
    if is_dtensor(parameter) and (is_dtensor(live) or not isinstance(live, Tensor)) and window.dim():
        return live if usable else empty_like(parameter, window.shape, window.dtype)
    if not source.is_window(window) or not source.is_alone(window):
        return None
    if usable:
        result: Tensor = live
        return result
    # No state yet. On other devices: go there tensor by tensor, not through a full copy in host memory.
    # Only `step` may belong on the CPU, which the optimizer decides.
    if parameter.device.type in ("cpu", "meta") or key == "step":
        return None
    return torch.empty_like(window, device=parameter.device)


def _has_names(saved: Any) -> bool:
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    return isinstance(groups, list) and any(isinstance(id_, str) for group in groups for id_ in group.get("params", ()))


def _has_pre_hooks(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))


def _unflattened(saved: Any) -> Any:
    """From ``state.NAME.exp_avg`` and ``param_groups.NAME.lr``, as torch's state dict functions can write it."""
    if not isinstance(saved, Mapping) or "param_groups" in saved:
        return saved
    groups: dict[str, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        kind, _, rest = str(key).partition(".")
        parameter, _, entry = rest.rpartition(".")
        if kind not in ("state", "param_groups") or not parameter:
            return saved
        if kind == "state":
            state.setdefault(parameter, {})[entry] = value
        else:
            groups.setdefault(parameter, {"params": [parameter]})[entry] = value
    return {"state": state, "param_groups": list(groups.values())} if groups else saved
