"""Deciding whether and how a loader is divided among the ranks."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from fabric_core.data.lengths import has_iterable_dataset, sized_len
from fabric_core.data.rebuild import index_sampler, reinstantiate
from fabric_core.data.sampler import DistributedSamplerWrapper
from fabric_core.errors import InvalidTypeError
from fabric_core.settings import GLOBAL_SEED


def distributed_loader(
    loader: DataLoader[Any], *, num_replicas: int, rank: int, **sampler_options: Any
) -> DataLoader[Any]:
    """A loader over this rank's share of the data, or ``loader`` itself if it is divided already or is a stream.

    Random order stays random and everything else keeps its order. The random order depends on the seed of
    ``seed_everything`` (0 if there was none) and the epoch only, never on what else drew random numbers, so all ranks
    agree. A sampler of the user's own is run as it is, and what it yields is divided.

    Args:
        loader: what the user made.
        num_replicas: how many ranks share the data.
        rank: which of them this is.
        sampler_options: further arguments of ``DistributedSampler``, which win over the above.
    """
    if not isinstance(loader, DataLoader):
        raise InvalidTypeError(f"Expected a torch.utils.data.DataLoader, got {type(loader).__name__}.")
    sampler = index_sampler(loader)
    if has_iterable_dataset(loader) or isinstance(sampler, DistributedSampler):
        return loader
    options = {"num_replicas": num_replicas, "rank": rank, "seed": GLOBAL_SEED.integer() or 0, **sampler_options}
    return reinstantiate(loader, _divided(loader, sampler, options))


def _divided(loader: DataLoader[Any], sampler: Any, options: dict[str, Any]) -> DistributedSampler[Any]:
    # Only for all of the dataset, in order or permuted, is there a DistributedSampler that yields the same indices.
    # A subclass's order, drawing with replacement, and another number of samples than there are survive in the wrapper.
    is_random = type(sampler) is RandomSampler and not sampler.replacement
    if (is_random or type(sampler) is SequentialSampler) and sized_len(sampler) == sized_len(loader.dataset):
        return DistributedSampler(loader.dataset, **{"shuffle": is_random, **options})
    return DistributedSamplerWrapper(sampler, **options)
