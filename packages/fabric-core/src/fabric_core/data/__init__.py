"""What Fabric does to data loaders: give each rank its share, seed the workers, tell samplers the epoch.

Importing this package imports nothing else; a name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:
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

_TABLE = {
    "DistributedSamplerWrapper": "fabric_core.data.sampler:DistributedSamplerWrapper",
    "auto_worker_init": "fabric_core.data.workers:auto_worker_init",
    "capture_constructors": "fabric_core.data.capture:capture_constructors",
    "distributed_loader": "fabric_core.data.sharding:distributed_loader",
    "has_iterable_dataset": "fabric_core.data.lengths:has_iterable_dataset",
    "has_len": "fabric_core.data.lengths:has_len",
    "reinstantiate": "fabric_core.data.rebuild:reinstantiate",
    "set_sampler_epoch": "fabric_core.data.epochs:set_sampler_epoch",
    "sized_len": "fabric_core.data.lengths:sized_len",
    "suggested_max_num_workers": "fabric_core.data.workers:suggested_max_num_workers",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
