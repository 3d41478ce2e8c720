"""Checks before an object is set up, and moving a module to its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core.abc.strategy import Strategy
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.module_init import tensors_of
from fabric_core.warnings import possible_user_warning
from fabric_core.wrappers.optimizer import FabricOptimizer
from fabric_core.wrappers.unwrap import is_wrapped


def check_module(module: object, method: str) -> None:
    """``TypeError`` for what is no module, ``ValueError`` for one that is set up already."""
    if is_wrapped(module):
        raise InvalidArgumentError(
            f"fabric.{method}() was given a module that Fabric has set up already. Pass the bare "
            "module, once; use what the first call returned."
        )
    if not isinstance(module, nn.Module):
        hint = " Pass an instance, not the class." if isinstance(module, type) else ""
        raise InvalidTypeError(f"fabric.{method}() takes a torch.nn.Module first, not {_kind(module)}.{hint}")


def check_optimizers(optimizers: Sequence[object], method: str) -> None:
    """``TypeError`` for what is no optimizer, ``ValueError`` for one that is set up already."""
    for optimizer in optimizers:
        if type(optimizer) is FabricOptimizer:
            raise InvalidArgumentError(
                f"fabric.{method}() was given an {type(optimizer.optimizer).__name__} that Fabric has "
                "set up already. Pass the bare optimizer, once; use what the first call returned."
            )
        if not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "param_groups"):
            raise InvalidTypeError(
                f"fabric.{method}() takes torch optimizers, not {_kind(optimizer)}. A scheduler goes to "
                "fabric.setup(model, optimizer, scheduler=scheduler)."
            )


def check_dataloaders(loaders: Sequence[object]) -> None:
    """``ValueError`` for none and for one that is set up already, ``TypeError`` for what is no data loader."""
    if not loaders:
        raise InvalidArgumentError("fabric.setup_dataloaders() needs at least one data loader.")
    for loader in loaders:
        if is_wrapped(loader):
            raise InvalidArgumentError(
                "fabric.setup_dataloaders() was given a data loader that Fabric has set up already. Pass the bare "
                "loader, once; use what the first call returned."
            )
        if not isinstance(loader, DataLoader):
            raise InvalidTypeError(
                f"fabric.setup_dataloaders() takes torch.utils.data.DataLoader objects, not {_kind(loader)}. Wrap a "
                "data set first: DataLoader(dataset, batch_size=...)."
            )


def _kind(obj: object) -> str:
    return f"the class {obj.__name__}" if isinstance(obj, type) else f"a {type(obj).__name__}"


def move_module(module: nn.Module, strategy: Strategy) -> None:
    """Have the strategy put the module on its device, in place; warn of one that is spread over several."""
    if not strategy.shards_in_place and len({tensor.device for tensor in tensors_of(module)}) > 1:
        _warn_of_several_devices(module, strategy.root_device)
    strategy.module_to_device(module)


def _warn_of_several_devices(module: nn.Module, target: torch.device) -> None:
    counts: dict[torch.device, int] = {}
    examples: dict[torch.device, str] = {}
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            counts[tensor.device] = counts.get(tensor.device, 0) + 1
            examples.setdefault(tensor.device, name)
    listing = ", ".join(f"{n} on {device} (such as {examples[device]!r})" for device, n in counts.items())
    possible_user_warning(
        f"The module's parameters and buffers are on several devices: {listing}. All are moved to {target}. To keep "
        "them where they are, pass move_to_device=False."
    )


def bind_to_fabric(module: Any, fabric: Any, optimizers: list[Any]) -> bool:
    """Tell a module that asks for it (it has an attribute ``_fabric``) who runs it; whether it asked."""
    if not hasattr(module, "_fabric"):
        return False
    module._fabric = fabric
    module._fabric_optimizers = optimizers
    return True
