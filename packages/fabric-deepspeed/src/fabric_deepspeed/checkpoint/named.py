"""What of the state that a user passes is the engine, its optimizer, and everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.engine import Engine, engine_of


@dataclass(frozen=True)
class NamedEngine:
    """One engine, by the names that the user has for its parts.

    Attributes:
        engine: the engine.
        module: the name of its module; ``None`` if only the optimizer is in the state.
        optimizer: the name of its optimizer; ``None`` if that is not in the state.
        others: all other entries.
    """

    engine: Engine
    module: str | None
    optimizer: str | None
    others: dict[str, Any]


def find_engine(state: dict[str, Any]) -> NamedEngine | None:
    """The engine in ``state``, ``None`` if nothing in it belongs to one. ``InvalidArgumentError`` if there are more."""
    owners = {key: engine for key, value in state.items() if (engine := engine_of(value)) is not None}
    modules = [key for key in owners if isinstance(state[key], nn.Module)]
    optimizers = [key for key in owners if key not in modules]
    if not owners:
        return None
    if len(modules) > 1 or len(optimizers) > 1 or len({id(engine) for engine in owners.values()}) > 1:
        raise InvalidArgumentError(
            f"The state names {', '.join(map(repr, owners))}, which are more than one model and its optimizer. A "
            "checkpoint of DeepSpeed holds one: save each model with its optimizer to a path of its own."
        )
    others = {key: value for key, value in state.items() if key not in owners}
    module, optimizer = next(iter(modules), None), next(iter(optimizers), None)
    return NamedEngine(next(iter(owners.values())), module, optimizer, others)


def the_engine(state: dict[str, Any]) -> NamedEngine:
    """The engine in a state to be saved, with its module.

    ``InvalidArgumentError`` if there is none, or more than one.
    """
    named = find_engine(state)
    if named is None or named.module is None:
        has = ", ".join(map(repr, state)) or "nothing"
        raise InvalidArgumentError(
            f"The state has {has}, and none of it is a model that was set up with DeepSpeed, whose checkpoint this is. "
            'Pass the model that fabric.setup(...) returned: {"model": model, "optimizer": optimizer, ...}.'
        )
    return named
