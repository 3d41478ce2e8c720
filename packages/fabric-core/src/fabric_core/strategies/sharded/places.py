"""Where parameters stand in a module, so that they are found again after sharding has replaced them."""

from __future__ import annotations

import weakref
from typing import Any, Final

from torch import nn

_PLACE: Final = "_fabric_place"
"""Attribute of a parameter: its ``Place``. A parameter that was replaced keeps it as long as somebody holds it."""


class Place:
    """Every place of one parameter: modules, held weakly, and its names there; several if it is tied."""

    def __init__(self) -> None:
        self._all: list[tuple[weakref.ref[nn.Module], str]] = []

    def add(self, owner: nn.Module, name: str) -> Place:
        """One more place."""
        self._all.append((weakref.ref(owner), name))
        return self

    def parameter(self) -> nn.Parameter | None:
        """What stands at the first place now."""
        owner = self._all[0][0]()
        return None if owner is None else owner._parameters.get(self._all[0][1])

    def put(self, parameter: nn.Parameter) -> None:
        """Put another parameter at every place."""
        for owner, name in self._all:
            module = owner()
            if module is not None:
                module._parameters[name] = parameter


def remember_places(module: nn.Module) -> None:
    """Write onto every parameter where it stands."""
    forget_places(module)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                parameter.__dict__.setdefault(_PLACE, Place()).add(part, name)


def forget_places(module: nn.Module) -> None:
    """Take the notes off the parameters that are in the module, and leave them on those that were."""
    for parameter in module.parameters():
        parameter.__dict__.pop(_PLACE, None)


def place_of(parameter: Any) -> Place | None:
    """Where a parameter stands or stood; ``None`` if nobody has written that down."""
    place: Place | None = getattr(parameter, _PLACE, None)
    return place
