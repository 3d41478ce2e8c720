"""Preparing modules, optimizers and data loaders."""

from __future__ import annotations

from typing import Any

from torch import nn

from fabric_core.abc.overrides import overrides
from fabric_core.abc.precision import Precision
from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_core.facade.reporting import Reporting
from fabric_core.wrappers.compile import unwrap_compiled
from fabric_core.wrappers.dataloader import FabricDataLoader
from fabric_core.wrappers.module import FabricModule
from fabric_core.wrappers.optimizer import FabricOptimizer
from fabric_core.wrappers.placement import (
    bind_to_fabric,
    check_dataloaders,
    check_module,
    check_optimizers,
    move_module,
)


class SettingUp(Reporting):
    """``setup``, ``setup_module``, ``setup_optimizers`` and ``setup_dataloaders``."""

    def setup(
        self,
        module: nn.Module,
        *optimizers: Any,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Prepare a module and its optimizers for the chosen hardware, strategy and precision.

        Args:
            module: the bare module, compiled or not.
            *optimizers: over the module's parameters.
            scheduler: for strategies that take it over; only together with an optimizer.
            move_to_device: put the module on this process's device.

        Returns:
            The module alone, or a tuple of module, optimizers in order, and the scheduler if one was given.

        Raises:
            TypeError: not a module, not an optimizer.
            ValueError: set up already, or a scheduler without optimizers.
            RuntimeError: not launched, or an order that the strategy cannot work with.
        """
        self._require_launch("setup")
        self._check_setup(module, optimizers, scheduler)
        wrapped, made, scheduler = self._wrap(module, list(optimizers), scheduler, move_to_device, _reapply_compile)
        if not optimizers:
            return wrapped
        return (wrapped, *made) if scheduler is None else (wrapped, *made, scheduler)

    def _check_setup(self, module: nn.Module, optimizers: tuple[Any, ...], scheduler: Any) -> None:
        check_module(module, "setup")
        check_optimizers(optimizers, "setup")
        if not optimizers and scheduler is not None:
            raise InvalidArgumentError(
                "fabric.setup(module, scheduler=...) got a scheduler but no optimizer. Pass the optimizer too: "
                "fabric.setup(module, optimizer, scheduler=scheduler)."
            )
        if optimizers and self._strategy.setup_mode == "separate":
            raise UsageError(
                f"strategy={self._plan.strategy.name!r} shards the module before an optimizer can refer to it. Call "
                "model = fabric.setup_module(model) first, create the optimizer from model.parameters(), then "
                "fabric.setup_optimizers(optimizer)."
            )
        self._strategy.validate_optimizer(optimizers)

    def setup_module(self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True) -> Any:
        """Prepare a module alone: for inference, or to create the optimizer afterwards.

        Raises:
            TypeError: not a module.
            ValueError: set up already.
            RuntimeError: not launched.
        """
        self._require_launch("setup_module")
        check_module(module, "setup_module")
        return self._wrap(module, [], None, move_to_device, _reapply_compile)[0]

    def _wrap(
        self, module: nn.Module, optimizers: list[Any], scheduler: Any, move_to_device: bool, reapply_compile: bool
    ) -> tuple[FabricModule, list[FabricOptimizer], Any]:
        original, recompile = unwrap_compiled(module)
        converted = self._precision.convert_module(original)
        # Without compiling anew, the strategy wraps the compiled module, as long as precision left it the same object.
        inner = module if not reapply_compile and converted is original else converted
        if move_to_device:
            move_module(converted, self._strategy)
            if overrides(self._precision, Precision, "convert_placed_module"):
                self._precision.convert_placed_module(converted, self._strategy)
        forward: nn.Module
        if recompile is not None and reapply_compile:
            forward, optimizers, scheduler = self._strategy.setup_compiled(inner, optimizers, scheduler, recompile)
        elif optimizers:
            forward, optimizers, scheduler = self._strategy.setup_module_and_optimizers(inner, optimizers, scheduler)
        else:
            forward = self._strategy.setup_module(inner)
        wrapped = FabricModule(forward, self._strategy, converted)
        made = [FabricOptimizer(optimizer, self._strategy, self._callbacks) for optimizer in optimizers]
        if bind_to_fabric(original, self, made) and not any(original is c for c in self._callbacks):
            self._callbacks.append(original)
        self.call("on_after_setup", fabric=self, module=wrapped)
        self._notify("fabric_on_setup", module=wrapped, optimizers=made)
        return wrapped, made, scheduler

    def setup_optimizers(self, *optimizers: Any) -> Any:
        """Prepare optimizers alone, after ``setup_module``; returns one, or a tuple in the same order.

        Raises:
            ValueError: none given, or set up already.
            RuntimeError: the strategy needs module and optimizer together, or a parameter has no memory yet.
        """
        self._require_launch("setup_optimizers")
        if not optimizers:
            raise InvalidArgumentError("fabric.setup_optimizers() needs at least one optimizer.")
        if self._strategy.setup_mode == "joint":
            raise UsageError(
                f"strategy={self._plan.strategy.name!r} sets up module and optimizer together: "
                "model, optimizer = fabric.setup(model, optimizer)."
            )
        check_optimizers(optimizers, "setup_optimizers")
        self._strategy.validate_optimizer(optimizers)
        made = tuple(
            FabricOptimizer(self._strategy.setup_optimizer(optimizer), self._strategy, self._callbacks)
            for optimizer in optimizers
        )
        self._notify("fabric_on_setup", module=None, optimizers=list(made))
        return made[0] if len(made) == 1 else made

    def setup_dataloaders(
        self, *dataloaders: Any, use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Prepare data loaders: each rank gets its share, batches arrive on the device.

        Args:
            *dataloaders: one or several.
            use_distributed_sampler: split the data over ranks; ``False`` if the sampler does that already.
            move_to_device: put every batch on this process's device.

        Returns:
            One loader, or a list in the same order.

        Raises:
            ValueError: none given, or set up already.
            TypeError: not a ``torch.utils.data.DataLoader``.
        """
        self._require_launch("setup_dataloaders")
        check_dataloaders(dataloaders)
        made = [self._distribute(loader, use_distributed_sampler, move_to_device) for loader in dataloaders]
        return made[0] if len(made) == 1 else made

    def _distribute(self, loader: Any, use_distributed_sampler: bool, move_to_device: bool) -> FabricDataLoader:
        from fabric_core.data.sharding import distributed_loader  # a program without data loaders pays nothing
        from fabric_core.data.workers import auto_worker_init

        split = self._strategy.distributed_sampler_kwargs
        if use_distributed_sampler and split is not None:
            loader = distributed_loader(loader, **split)
        auto_worker_init(loader, self.global_rank)
        loader = self._strategy.process_dataloader(loader)
        return FabricDataLoader(loader, self.device if move_to_device and not self._strategy.moves_batches else None)
