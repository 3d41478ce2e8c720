"""The engines that a strategy has set up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_deepspeed.engine import Engine, engine_of
from fabric_deepspeed.gradients import Gradients


class LiveEngines:
    """Engines that train stay until the end: DeepSpeed's hooks on the parameters keep them anyway."""

    def __init__(self) -> None:
        self._engines: list[weakref.ref[Engine]] = []
        self._trained: list[Gradients] = []
        self._gradients: dict[Engine, Gradients] = {}

    def add(self, engine: Engine, *, trains: bool, frozen: Sequence[Tensor] = ()) -> None:
        """Remember an engine; ``frozen`` as for ``Gradients``."""
        self._engines.append(weakref.ref(engine))
        if trains:
            self._gradients[engine] = gradients = Gradients(engine, frozen)
            self._trained.append(gradients)

    def __iter__(self) -> Iterator[Engine]:
        return iter([engine for found in self._engines if (engine := found()) is not None])

    def find(self, obj: Any) -> Gradients | None:
        """The gradients of the engine that trains ``obj``: an engine, its module or its optimizer."""
        engine = engine_of(obj)
        return None if engine is None else self._gradients.get(engine)

    def of(self, obj: Any, call: str) -> Gradients:
        """What ``find`` finds; ``RuntimeError`` that names the ``call`` if that is nothing."""
        gradients = self.find(obj)
        if gradients is None:
            raise UsageError(
                f"{call} was given a {type(obj).__name__} that no live DeepSpeed engine trains. Set up model and "
                "optimizer together, model, optimizer = fabric.setup(model, optimizer), and keep both."
            )
        return gradients

    def backward(self, loss: Tensor, module: nn.Module | None, retain_graph: bool) -> None:
        """Backward through the engine of ``module``, or through the only one."""
        gradients = self.only() if module is None else self.of(module, "fabric.backward(loss, model=...)")
        gradients.backward(loss, retain_graph)
        if len(self._trained) > 1:
            for other in self._trained:
                other.touched = True

    def only(self) -> Gradients:
        """The gradients of the one engine that trains.

        Raises:
            RuntimeError: there is none.
            ValueError: there are several.
        """
        if len(self._trained) > 1:
            raise InvalidArgumentError(
                f"{len(self._trained)} models are set up to be trained by DeepSpeed, each with a backward pass of its "
                "own; one that is not used any more counts until fabric.teardown(). Say which one the loss comes from: "
                "fabric.backward(loss, model=model)."
            )
        if not self._trained:
            raise UsageError(
                "fabric.backward() goes through a DeepSpeed engine, and no model is set up to be trained. Set it up "
                "with its optimizer first: model, optimizer = fabric.setup(model, optimizer)."
            )
        return self._trained[0]
