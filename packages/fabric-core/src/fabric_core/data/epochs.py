"""Telling samplers which epoch begins, so that each shuffles anew and alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def set_sampler_epoch(loader: object, epoch: int) -> None:
    """Call ``set_epoch(epoch)``, once each, on the loader's sampler, batch sampler and the sampler in the latter."""
    for set_epoch in _set_epochs(loader):
        set_epoch(epoch)


def sampler_epoch(loader: object) -> int | None:
    """The epoch that the loader's samplers are at, if one shows it as torch's ``DistributedSampler`` does."""
    for sampler in _samplers(loader):
        epoch = getattr(sampler, "epoch", None)
        if isinstance(epoch, int) and epoch >= 0 and callable(getattr(sampler, "set_epoch", None)):
            return epoch
    return None


def _samplers(loader: object) -> Iterator[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    yield from {id(sampler): sampler for sampler in samplers}.values()


def _set_epochs(loader: object) -> Iterator[Callable[[int], Any]]:
    for sampler in _samplers(loader):
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            yield set_epoch
