"""Names for types that occur all over the public surface. Nothing here runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch

Path: TypeAlias = "str | PathLike[str]"
Device: TypeAlias = "torch.device | str | int"
MapLocation: TypeAlias = "Device | Callable[..., Any] | dict[Device, Device] | None"
Parameters: TypeAlias = "Iterator[torch.nn.Parameter]"


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken out and put back: modules, optimizers, schedulers, user classes."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain containers and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put the state back in place."""


@runtime_checkable
class Steppable(Protocol):
    """Anything with the ``step`` of an optimizer."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Advance once."""


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """The surface of an optimizer, whatever its class."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: dict[Any, Any]

    def state_dict(self) -> dict[str, dict[Any, Any]]:
        """The state, as plain containers and tensors."""

    def load_state_dict(self, state_dict: dict[str, dict[Any, Any]]) -> None:
        """Put the state back in place."""


@runtime_checkable
class CollectibleGroup(Protocol):
    """A process group, as far as collectives need to know it."""

    def size(self) -> int:
        """How many processes belong to the group."""

    def rank(self) -> int:
        """This process's rank in the group, -1 if it does not belong to it."""
