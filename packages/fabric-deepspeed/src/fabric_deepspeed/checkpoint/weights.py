"""A module's weights into an engine and out of it, at every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fabric_core.checkpoint.portable import clean_name
from fabric_core.checkpoint.self_loading import own_problems, self_loading
from fabric_core.errors import CheckpointError, CheckpointKeyError
from fabric_deepspeed.checkpoint.live import (
    FlatOptimizer,
    Fragment,
    changing,
    flat_optimizer,
    gathered,
    is_split,
    live_state,
    names_of,
    shape_of,
)
from fabric_deepspeed.engine import Engine

Read = Callable[[Any], Any]
"""Brings a stored tensor, or whatever else is stored, to host memory."""


def gather_weights(engine: Engine, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The module's state with whole parameters, one after the other. Every rank calls it.

    Args:
        engine: the engine.
        names: of the entries that are wanted; all by default.

    Returns:
        At stage 3 copies in host memory on rank 0, ``{}`` elsewhere; at other stages the live tensors, on every rank.
        Tied parameters are the same tensor.
    """
    state = live_state(engine)
    wanted = set(state if names is None else names)
    if not any(map(is_split, state.values())):
        return {name: _detached(value) for name, value in state.items() if name in wanted}
    is_first = torch.distributed.get_rank() == 0
    whole: dict[int, Any] = {}
    result: dict[str, Any] = {}
    for name, value in state.items():
        if name not in wanted:
            continue
        if is_split(value) and id(value) not in whole:
            with gathered([value]):
                whole[id(value)] = value.detach().to("cpu", copy=True) if is_first else None
        result[name] = whole[id(value)] if is_split(value) else _detached(value)
    return result if is_first else {}


def check_weights(engine: Engine, saved: Mapping[str, Any], strict: bool, optional: Iterable[str], name: str) -> None:
    """Raise if ``saved`` cannot be loaded into the engine's module.

    Args:
        engine: the engine.
        saved: by clean names.
        strict: the keys must agree.
        optional: keys that may be missing even so.
        name: for messages.

    Raises:
        CheckpointKeyError: keys that differ, if ``strict``; all of them are named.
        CheckpointError: shapes that differ.
    """
    live = live_state(engine)
    shapes = [
        f"{key} is {tuple(value.shape)} in the checkpoint and {tuple(shape_of(live[key]))} in the module"
        for key, value in saved.items()
        if isinstance(value, Tensor) and isinstance(live.get(key), Tensor) and value.shape != shape_of(live[key])
    ]
    kind = type(engine.module).__name__
    told = [f"Different shapes: {'; '.join(shapes)}"] if shapes else []
    told += own_problems(self_loading(engine.module), saved, strict)
    if told:
        raise CheckpointError(f"{name} does not fit {kind}. Nothing was loaded. {'. '.join(told)}.")
    # Batch norms of old torch versions did not count batches; loading fills that in.
    may_miss = {*optional, *(key for key in live if key.endswith("num_batches_tracked"))}
    missing = [key for key in live if key not in saved and key not in may_miss]
    unexpected = [key for key in saved if key not in live]
    problems = [f"Missing in the checkpoint: {', '.join(missing)}"] if missing else []
    problems += [f"Unknown to the module: {', '.join(unexpected)}"] if unexpected else []
    if strict and problems:
        raise CheckpointKeyError(
            f"{name} does not fit {kind}. Nothing was loaded. {'. '.join(problems)}. Pass strict=False to load what "
            "both have."
        )


@torch.no_grad()
def load_weights(engine: Engine, saved: Mapping[str, Any], read: Read) -> None:
    """Put what of ``saved`` the module has into it, and into the weights that its optimizer steps. Every rank calls it.

    Layer by layer, so that no more than one is whole in memory; each layer's own loading code and hooks run.

    Args:
        engine: the engine.
        saved: by clean names; the same on every rank. It was checked.
        read: brings a value of ``saved`` to host memory; called on all ranks in the same order.
    """
    optimizer = flat_optimizer(engine)
    names = names_of(engine)
    with changing(engine):
        for path, layer in engine.module.named_modules():
            prefix = f"{path}." if path else ""
            own = {key: read(saved[clean]) for key, clean in _own_keys(layer, prefix) if clean in saved}
            if own:
                _load_layer(layer, prefix, own, getattr(saved, "_metadata", {}).get(clean_name(path), {}))
                if optimizer is not None:
                    _load_masters(layer, prefix, own, optimizer, names)
    if optimizer is None and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def _own_keys(layer: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """The keys of what the layer itself has in its module's state, and how they are stored."""
    own = [*layer._parameters, *layer._buffers, "_extra_state"]
    return [(prefix + name, clean_name(prefix + name)) for name in own]


def _load_layer(layer: nn.Module, prefix: str, own: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    errors: list[str] = []
    direct = [parameter for parameter in layer._parameters.values() if parameter is not None]
    with gathered(direct, writer=0):
        layer._load_from_state_dict(own, prefix, dict(metadata), False, [], [], errors)
    if errors:
        raise CheckpointError(f"The weights of {prefix.rstrip('.')!r} cannot be loaded: {'; '.join(errors)}")


def _load_masters(
    layer: nn.Module,
    prefix: str,
    own: Mapping[str, Any],
    optimizer: FlatOptimizer,
    names: Mapping[nn.Parameter, str],
) -> None:
    for key, parameter in layer._parameters.items():
        value = own.get(prefix + key)
        fragment: Fragment | None = optimizer.fragments.get(names[parameter]) if parameter is not None else None
        if fragment is not None and isinstance(value, Tensor):
            fragment.put(value, optimizer.weights(fragment.flat))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
