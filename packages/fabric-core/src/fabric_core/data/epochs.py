"""Telling samplers which epoch begins, so that each shuffles anew and alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def set_sampler_epoch(loader: object, epoch: int) -> None:
    """Call ``set_epoch(epoch)``, once each, on the loader's sampler, batch sampler and the sampler in the latter."""
    for set_epoch in _set_epochs(loader):
        set_epoch(epoch)


def _set_epochs(loader: object) -> Iterator[Callable[[int], Any]]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for sampler in {id(sampler): sampler for sampler in samplers}.values():
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            yield set_epoch
