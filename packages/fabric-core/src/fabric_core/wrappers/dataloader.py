"""The cover around a data loader: batches arrive on the device, and every epoch is shuffled anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fabric_core.collections import batch_mover
from fabric_core.data.epochs import sampler_epoch, set_sampler_epoch


class FabricDataLoader:
    """Iterates like the data loader inside, which keeps all its attributes.

    Args:
        dataloader: the loader, its sampler already split over processes if it should be.
        device: where batches go; ``None`` leaves them where they are.
    """

    _OWN = frozenset({"dataloader", "_device", "_epoch", "_told"})

    def __init__(self, dataloader: Any, device: torch.device | None = None) -> None:
        self.dataloader = dataloader
        self._device = device
        self._epoch = 0
        self._told = 0  # what the samplers were told last, or start with

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(loader, DataLoader) holds, without touching a class
        return type(self.dataloader)

    @property
    def device(self) -> torch.device | None:
        """Where batches go; ``None`` if they stay where they are."""
        return self._device

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch ``epoch``, as when resuming; otherwise epochs count up by themselves."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        chosen = sampler_epoch(self.dataloader)
        if chosen is not None and chosen != self._told:  # the user called the sampler's own set_epoch
            self._epoch = chosen
        set_sampler_epoch(self.dataloader, self._epoch)
        self._told = self._epoch
        self._epoch += 1
        if self._device is None:
            return iter(self.dataloader)
        return _moved(iter(self.dataloader), batch_mover(self._device))

    def __getattr__(self, name: str) -> Any:
        if name == "dataloader":  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            self.__dict__[name] = value
        else:
            setattr(self.dataloader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.dataloader, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.dataloader, self._device, self._epoch, self._told)


def _moved(batches: Iterator[Any], move: Any) -> Iterator[Any]:
    for batch in batches:
        yield move(batch)


def _restore(dataloader: Any, device: torch.device | None, epoch: int, told: int) -> FabricDataLoader:
    loader = FabricDataLoader(dataloader, device)
    loader._epoch, loader._told = epoch, told
    return loader
