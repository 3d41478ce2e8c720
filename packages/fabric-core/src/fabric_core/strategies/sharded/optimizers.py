"""Optimizers that were created before the module was sharded: from the old parameters to the new ones, by place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_core.checkpoint.dtensors import part_for
from fabric_core.errors import UsageError
from fabric_core.strategies.sharded.groups import fsdp_modules
from fabric_core.strategies.sharded.places import Place, place_of


class LiftedOptimizers:
    """Optimizers with places instead of parameters, so that they do not keep whole parameters alive meanwhile.

    Call ``remember_places`` before, and ``lower`` in any case.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            _replace(optimizer, lambda parameter: place_of(parameter) or parameter)

    def lower(self) -> None:
        """Put in what stands at the places now."""
        for optimizer in self._optimizers:
            _replace(optimizer, lambda place: place.parameter() if isinstance(place, Place) else place)


def point_at_shards(optimizer: Optimizer, modules: Iterable[nn.Module]) -> None:
    """Replace parameters that sharding has replaced, with their state; all others must belong to ``modules``.

    Raises:
        RuntimeError: a parameter belongs to no module that is set up.
    """
    known = _places_in(modules)
    moved: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place = place_of(parameter) or known.get(id(parameter))
            new = place.parameter() if place is not None else None
            if new is None and not isinstance(parameter, DTensor):
                raise _stranger(optimizer, parameter)
            moved[id(parameter)] = parameter if new is None else new
    _replace(optimizer, lambda parameter: moved.get(id(parameter), parameter))


def _places_in(modules: Iterable[nn.Module]) -> dict[int, Place]:
    """Every parameter's place, by the parameter's id; also that of whole parameters which a forward left behind."""
    places: dict[int, Place] = {}
    for module in modules:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), Place()).add(part, name)
        for unit in fsdp_modules(module):
            unit.reshard()
    return places


def _replace(optimizer: Optimizer, change: Callable[[Any], Any]) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [change(p) for p in group["params"]]  # the list stays: LBFGS holds it too
    state = list(optimizer.state.items())
    optimizer.state.clear()
    for key, value in state:
        new = change(key)
        optimizer.state[new] = value if new is key else _state_for(new, value)


def _stranger(optimizer: Optimizer, parameter: Any) -> UsageError:
    what = f"a parameter of shape {tuple(parameter.shape)}" if isinstance(parameter, Tensor) else "a parameter"
    return UsageError(
        f"The optimizer {type(optimizer).__name__} holds {what} that belongs to no module set up by this strategy, so "
        "it cannot be found among the sharded ones. Set up the module first, "
        "model = fabric.setup_module(model); optimizer = fabric.setup_optimizers(Adam(model.parameters())), or both "
        "together, model, optimizer = fabric.setup(model, optimizer)."
    )


def _state_for(parameter: Any, state: Any) -> Any:
    """Optimizer state of a whole parameter, split as the parameter is now."""
    if not isinstance(parameter, DTensor) or not isinstance(state, dict):
        return state
    return {name: _split_like(parameter, value) for name, value in state.items()}


def _split_like(parameter: DTensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != parameter.shape or not value.dim():
        return value
    part, memory = part_for(value, parameter)
    part = part.to(memory.device, copy=True)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
