"""What Fabric does to data loaders: give each rank its share, seed the workers, tell samplers the epoch.

Importing this package imports nothing else; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.data.attribute_dict import AttributeDict as AttributeDict
    from fabric_core.data.capture import capture_constructors as capture_constructors
    from fabric_core.data.epochs import set_sampler_epoch as set_sampler_epoch
    from fabric_core.data.lengths import has_iterable_dataset as has_iterable_dataset
    from fabric_core.data.lengths import has_len as has_len
    from fabric_core.data.lengths import sized_len as sized_len
    from fabric_core.data.rebuild import reinstantiate as reinstantiate
    from fabric_core.data.sampler import DistributedSamplerWrapper as DistributedSamplerWrapper
    from fabric_core.data.sharding import distributed_loader as distributed_loader
    from fabric_core.data.workers import auto_worker_init as auto_worker_init
    from fabric_core.data.workers import suggested_max_num_workers as suggested_max_num_workers

_HOME = {
    "AttributeDict": "attribute_dict",
    "DistributedSamplerWrapper": "sampler",
    "auto_worker_init": "workers",
    "capture_constructors": "capture",
    "distributed_loader": "sharding",
    "has_iterable_dataset": "lengths",
    "has_len": "lengths",
    "reinstantiate": "rebuild",
    "set_sampler_epoch": "epochs",
    "sized_len": "lengths",
    "suggested_max_num_workers": "workers",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
