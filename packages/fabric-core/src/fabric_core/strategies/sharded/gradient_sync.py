"""Gradient accumulation on FSDP units: no exchange of gradients for a while."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from fabric_core.errors import InvalidTypeError
from fabric_core.strategies.sharded.groups import GRADIENT_SWITCHES, fsdp_modules, parameter_groups


class ShardedGradientSync:
    """Switches the exchange of gradients of the modules that a strategy has set up.

    What there is to switch is found once, at set-up. A module without FSDP units exchanges nothing that could wait.
    """

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()

    def register(self, module: nn.Module) -> None:
        """Remember the units of a module that was just set up."""
        groups = [group for unit in fsdp_modules(module) for group in parameter_groups(unit)]
        self._groups[module] = [weakref.ref(group) for group in groups]

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """While entered, gradients are exchanged if ``enabled`` is False, and as before afterwards.

        Raises:
            TypeError: the module was not set up by this strategy.
        """
        if module not in self._groups:
            raise InvalidTypeError(
                f"no_backward_sync() was given a {type(module).__name__} that this strategy has not set up. Pass the "
                "module that fabric.setup() returned."
            )
        return _switched([group for ref in self._groups[module] if (group := ref()) is not None], not enabled)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for spawned workers, which set up modules of their own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


@contextmanager
def _switched(groups: list[Any], on: bool) -> Iterator[None]:
    before = [tuple(getattr(group, switch) for switch in GRADIENT_SWITCHES) for group in groups]
    try:
        for group in groups:
            for switch in GRADIENT_SWITCHES:
                setattr(group, switch, on)
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            for switch, value in zip(GRADIENT_SWITCHES, values, strict=True):
                setattr(group, switch, value)
