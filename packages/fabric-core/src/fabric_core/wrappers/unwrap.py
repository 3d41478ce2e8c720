"""From Fabric's covers back to the objects inside."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core.collections import apply_to_collection
from fabric_core.wrappers.compile import unwrap_compiled
from fabric_core.wrappers.dataloader import FabricDataLoader
from fabric_core.wrappers.module import FabricModule
from fabric_core.wrappers.optimizer import FabricOptimizer

_COVERS = (FabricModule, FabricOptimizer, FabricDataLoader)


def is_wrapped(obj: object) -> bool:
    """Whether ``obj`` is a module, optimizer or data loader that Fabric has set up, compiled afterwards or not."""
    return isinstance(unwrap_compiled(obj)[0], _COVERS)


def unwrap(obj: Any) -> Any:
    """What the strategy made of ``obj`` (such as the DDP module), or ``obj`` itself if Fabric did not wrap it."""
    inner = unwrap_compiled(obj)[0]
    if isinstance(inner, FabricModule):
        return unwrap_compiled(inner._forward_module)[0]
    if isinstance(inner, FabricOptimizer):
        return inner.optimizer
    if isinstance(inner, FabricDataLoader):
        return inner.dataloader
    return inner


def unwrap_values(state: dict[str, Any]) -> dict[str, Any]:
    """A dict with the values of ``state``: what is inside those that Fabric wrapped, all others as they are."""
    return {name: unwrap(value) for name, value in state.items()}


def unwrap_objects(collection: Any) -> Any:
    """``collection`` with everything that Fabric wrapped replaced by what is inside, at any depth."""
    return apply_to_collection(collection, (nn.Module, Optimizer, DataLoader, *_COVERS), unwrap)
