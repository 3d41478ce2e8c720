"""The cover around an optimizer: ``step`` goes where the strategy and the precision want it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from fabric_core.abc.overrides import overrides
from fabric_core.abc.strategy import Strategy


class FabricOptimizer:
    """Behaves as the optimizer inside: ``isinstance`` says so, reads and assignments reach it.

    Args:
        optimizer: the optimizer, as the strategy set it up.
        strategy: who knows how to step it.
        callbacks: live list; those with ``on_after_optimizer_step(strategy=..., optimizer=...)`` are told of each step.
    """

    # What schedulers and users may put onto the cover itself, such as a scheduler's counting `step`.
    _OWN = frozenset({"optimizer", "_strategy", "_callbacks", "_direct", "_clear", "step", "_opt_called"})

    def __init__(self, optimizer: Optimizer, strategy: Strategy, callbacks: list[Any] | None = None) -> None:
        own = self.__dict__
        own["optimizer"] = optimizer
        own["_strategy"] = strategy
        own["_callbacks"] = callbacks if callbacks is not None else []
        own["_direct"] = not strategy.changes_step
        own["_clear"] = strategy.zero_grad if overrides(strategy, Strategy, "zero_grad") else None

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(optimizer, Adam) holds, without touching a class
        return type(self.optimizer)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step through the strategy; then tell the callbacks."""
        if self._direct:
            output = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        else:
            kwargs = {} if closure is None else {"closure": closure}
            output = self._strategy.optimizer_step(self._strategy.step_target(self.optimizer), **kwargs)
        if self._callbacks:
            self._tell_callbacks()
        return output

    def _tell_callbacks(self) -> None:
        for callback in self._callbacks:
            hook = getattr(callback, "on_after_optimizer_step", None)
            if callable(hook):
                hook(strategy=self._strategy, optimizer=self.optimizer)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients, as the optimizer inside does, or as the strategy wants it."""
        if self._clear is None:
            self.optimizer.zero_grad(*args, **kwargs)
        else:
            self._clear(self.optimizer, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, through the strategy, so that one sharded over ranks is complete."""
        state: dict[str, Any] = self._strategy.get_optimizer_state(self.optimizer)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the optimizer inside, through the strategy."""
        self._strategy.load_optimizer_state(self.optimizer, state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            self.__dict__[name] = value
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            del self.__dict__[name]
        else:
            delattr(self.optimizer, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return FabricOptimizer, (self.optimizer, self._strategy, self._callbacks)

    def __deepcopy__(self, memo: dict[int, Any]) -> FabricOptimizer:
        return FabricOptimizer(copy.deepcopy(self.optimizer, memo), self._strategy, self._callbacks)

    def __repr__(self) -> str:
        return f"Fabric{self.optimizer!r}"
