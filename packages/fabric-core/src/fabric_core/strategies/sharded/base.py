"""The skeleton of the strategies that split parameters over processes: what happens around the splitting."""

from __future__ import annotations

import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.precision.sharded import adapt
from fabric_core.strategies.parallel import ParallelStrategy
from fabric_core.strategies.sharded.agreement import same_random_numbers
from fabric_core.strategies.sharded.checkpoints import ShardedCheckpoints
from fabric_core.strategies.sharded.gradient_sync import ShardedGradientSync
from fabric_core.strategies.sharded.groups import kept_whole
from fabric_core.strategies.sharded.optimizers import LiftedOptimizers, point_at_shards
from fabric_core.strategies.sharded.places import forget_places, remember_places
from fabric_core.strategies.sharded.unfilled import check_filled, watch

if TYPE_CHECKING:
    from fabric_core.abc.environment import ClusterEnvironment

Compile = Callable[[nn.Module], None]
"""Compiles the forward of a part of the module, in place, with the settings the user gave to ``torch.compile``."""


class ShardedStrategy(ShardedCheckpoints, ParallelStrategy):
    """Parameters are split over processes, in place. Subclasses say how, in ``shard``.

    A module may come on the CPU or on the meta device: it is never whole on the device. Optimizers may be created
    before or after the module is set up: those that refer to the whole parameters are pointed at the parts.

    Args:
        **parts: the arguments of ``ParallelStrategy``.
    """

    shards_in_place: ClassVar[bool] = True

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.gradient_sync: ShardedGradientSync = ShardedGradientSync()
        self._set_up: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @abstractmethod
    def shard(self, module: nn.Module, compile: Compile | None) -> nn.Module:
        """Split the parameters of ``module`` and give memory to those on the meta device; every rank calls it.

        Args:
            module: bare, never compiled; on the CPU, on the device or on the meta device.
            compile: to be called with each part that shall be compiled, before it is sharded; ``None`` if the user did
                not compile.

        Returns:
            What is to be called; usually ``module``, changed in place.
        """

    def build_meshes(self) -> None:
        """Make the device meshes; called once, when the process group is there."""

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take devices and environment; processes are started by running the script again."""
        super().connect(devices=devices, num_nodes=num_nodes, environment=environment, interactive=interactive)
        self.launcher = self.script_launcher()

    def setup_environment(self) -> None:
        """Join the process group, then make the meshes."""
        super().setup_environment()
        adapt(self.precision, self.root_device.type)
        self.build_meshes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_set_up": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up = weakref.WeakSet()

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """``empty_init=True``: new parameters have no memory until ``setup``; otherwise they are on the CPU."""
        with torch.device("meta" if empty_init else "cpu"), self.precision.module_init_context():
            yield

    def module_to_device(self, module: nn.Module) -> None:
        """Nothing: the module moves part by part when it is sharded."""

    def validate_optimizer(self, optimizers: Iterable[Optimizer]) -> None:
        """Nothing yet: set-up refuses those whose parameters it cannot find."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard the module. Optimizers over its former parameters can still be set up."""
        return self._shard_all(module, [], None)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard the module and point the optimizers at its new parameters."""
        return self._shard_all(module, optimizers, None), optimizers, scheduler

    def setup_compiled(
        self,
        module: nn.Module,
        optimizers: list[Optimizer],
        scheduler: Any,
        compile: Callable[[Any], Any],
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Compile part by part, before each is sharded."""

        def compile_part(part: nn.Module) -> None:
            part.forward = compile(part.forward)  # not `__call__`: hooks that gather parameters stay outside

        return self._shard_all(module, optimizers, compile_part), optimizers, scheduler

    def method_context(self, module: nn.Module) -> AbstractContextManager[None]:
        """The module's own parameters stay whole while a marked method runs, however often it calls forward."""
        return kept_whole(module)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Point the optimizer at the sharded parameters if it refers to the former ones.

        Raises:
            RuntimeError: a parameter belongs to no module that was set up.
        """
        point_at_shards(optimizer, self._set_up)
        return optimizer

    def _shard_all(self, module: nn.Module, optimizers: list[Optimizer], compile: Compile | None) -> nn.Module:
        inner = _inside_compiled(module)
        remember_places(inner)
        lifted = LiftedOptimizers(optimizers)
        try:
            with same_random_numbers(self.root_device):
                sharded = self.shard(inner, compile)
        finally:
            lifted.lower()
        forget_places(sharded)
        self._set_up.add(sharded)
        for optimizer in optimizers:
            point_at_shards(optimizer, self._set_up)
        watch(sharded, self.root_device)
        self.gradient_sync.register(sharded)
        return module if sharded is inner else sharded

    def check_initialised(self, module: nn.Module) -> None:
        """``RuntimeError`` that lists the parameters and buffers that have no values. Every rank calls it.

        Only what was on the meta device and has no initialiser is looked at, until it has values.
        """
        check_filled(module, self.root_device)


def _inside_compiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given: sharded in place, it is still called through the compiled one."""
    dynamo = sys.modules.get("torch._dynamo")
    compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return module._orig_mod if compiled else module  # type: ignore[return-value]
