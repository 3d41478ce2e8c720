"""The worker processes of data loaders: how many, and what they are seeded with."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from fabric_core.cpus import usable_cpus
from fabric_core.errors import InvalidArgumentError
from fabric_core.seeding import worker_init_function
from fabric_core.settings import SEED_WORKERS


def auto_worker_init(loader: DataLoader[Any], rank: int) -> None:
    """Have the loader's workers seeded per rank and worker, if ``seed_everything(workers=True)`` asked for it.

    A ``worker_init_fn`` that the user gave stays. Changes the loader itself; the function set can be pickled, as
    workers started by spawning need.
    """
    if SEED_WORKERS.flag() and loader.worker_init_fn is None:
        loader.worker_init_fn = partial(worker_init_function, rank=rank)


def suggested_max_num_workers(local_world_size: int) -> int:
    """The most data loader workers that leave each of this node's processes a CPU: its share minus one, at least 1.

    Only CPUs that this process may use count, see ``usable_cpus``.

    Args:
        local_world_size: how many training processes run on this node.
    """
    if local_world_size < 1:
        raise InvalidArgumentError(f"local_world_size={local_world_size}: at least one process runs on this node.")
    return max(1, usable_cpus() // local_world_size - 1)
