"""Gradient accumulation: the boundary of DeepSpeed's engine, moved for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from fabric_core.errors import InvalidTypeError
from fabric_deepspeed.gradients import Gradients
from fabric_deepspeed.live_engines import LiveEngines


class EngineGradientSync:
    """Holds the exchange of gradients back, for the engines that a strategy has set up."""

    def __init__(self, engines: LiveEngines) -> None:
        self._engines = engines

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """While entered with ``enabled``, backward through ``module`` only accumulates. Restores what it found.

        Stages 2 and 3 send each gradient to its owner in every backward pass all the same, because nobody keeps
        whole gradients there; it is accumulated by the owner.

        Raises:
            TypeError: the module was not set up for training by this strategy.
        """
        gradients = self._engines.find(module)
        if gradients is None:
            raise InvalidTypeError(
                f"no_backward_sync() was given a {type(module).__name__} that this strategy has not set up for "
                "training. Pass the module that fabric.setup(model, optimizer) returned."
            )
        return _held_back(gradients, enabled) if gradients.managed else nullcontext()


@contextmanager
def _held_back(gradients: Gradients, enabled: bool) -> Iterator[None]:
    before = gradients.held_back
    try:
        gradients.hold_back(enabled)
        yield
    finally:
        gradients.hold_back(before)
