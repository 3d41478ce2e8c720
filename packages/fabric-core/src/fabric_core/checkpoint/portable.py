"""Optimizer state by the names of parameters in place of numbers, so that it fits wherever the names are.

A name is where the parameter stands in its module, as in the module's state dict. Prefixes that wrappers add to it
(those of ``torch.compile``, activation checkpointing and data parallelism) never appear. An optimizer over parameters
of several modules puts the module's name in the state before it: ``generator.layer.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.errors import CheckpointError

_WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers inside the module add to it."""
    if "_wrapped_module" not in name and "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def clean_keys(state: Any) -> Any:
    """A module's state with clean names; ``state`` itself if they are clean already, or if it is no such thing."""
    if not isinstance(state, Mapping) or all(clean_name(key) == key for key in state if isinstance(key, str)):
        return state
    cleaned = type(state)((clean_name(key), value) for key, value in state.items())  # type: ignore[call-arg]
    if hasattr(state, "_metadata"):  # version numbers that modules read when loading
        versions = state._metadata
        cleaned._metadata = type(versions)((clean_name(key), value) for key, value in versions.items())  # type: ignore[attr-defined]
    return cleaned


def live_keys(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """A state with clean names under the names that ``module`` has for them, which may hold wrappers."""
    wrapped = [name for name, _ in module.named_modules() if name.endswith("_orig_mod")]
    if not wrapped:  # other wrappers take clean names themselves
        return state
    renamed = {clean_name(key): key for key in module.state_dict()}
    result = type(state)((renamed.get(key, key), value) for key, value in state.items())  # type: ignore[call-arg]
    if hasattr(state, "_metadata"):
        result._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    return result


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters in the order of its groups, which is that of the numbers in its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def names_of(optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    """A name for each of the optimizer's parameters.

    Args:
        optimizer: its parameters are looked for in ``modules``.
        modules: modules by their name in the state that is saved or loaded.

    Raises:
        CheckpointError: parameters that are in none of the modules.
    """
    parameters = parameters_of(optimizer)
    named = {key: _names_in(module) for key, module in modules.items()}
    for names in named.values():
        if all(parameter in names for parameter in parameters):
            return {parameter: names[parameter][0] for parameter in parameters}
    found: dict[Tensor, str] = {}
    for key, names in named.items():
        for parameter in parameters:
            if parameter in names:
                found.setdefault(parameter, f"{key}.{names[parameter][0]}")
    lost = [index for index, parameter in enumerate(parameters) if parameter not in found]
    if lost:
        raise CheckpointError(
            f"The state of {type(optimizer).__name__} is stored by the names of its parameters, but {len(lost)} of its "
            f"{len(parameters)} parameters are in no module of the state, which has "
            f"{', '.join(map(repr, modules)) or 'no module'}. Save the modules that the optimizer trains together with "
            'it: {"model": model, "optimizer": optimizer}.'
        )
    return found


def namings(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The ways in which a stored name may say which parameter it means, the most common first."""
    prefixed: dict[str, Tensor] = {}
    for key, module in modules.items():
        names = {name: parameter for parameter, places in _names_in(module).items() for name in places}
        yield names
        prefixed.update({f"{key}.{name}": parameter for name, parameter in names.items()})
    yield prefixed


def portable_optimizer_state(optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The optimizer's state dict with names in place of numbers, in ``state`` and in ``param_groups``.

    Tensors are the optimizer's own, sharded ones as they are. ``CheckpointError`` as ``names_of`` raises it.
    """
    names = list(names_of(optimizer, modules).values())
    if len(names) != len(parameters_of(optimizer)):  # the same parameter twice: torch numbers it once
        raise CheckpointError(f"{type(optimizer).__name__} has a parameter in two of its groups.")
    plain = optimizer.state_dict()
    numbers = [number for group in plain["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, names, strict=True))
    return {
        **plain,
        "state": {by_number.get(key, key): entries for key, entries in plain["state"].items()},
        "param_groups": [
            {**group, "params": [by_number[number] for number in group["params"]]} for group in plain["param_groups"]
        ],
    }


def _names_in(module: nn.Module) -> dict[Tensor, list[str]]:
    """Every parameter with all its names; tied ones have several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in inside_wrapper(module).named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(clean_name(name))
    return names


def inside_wrapper(module: nn.Module) -> nn.Module:
    """The module without the wrapper of data parallelism, whose prefix is in no state."""
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    return module
