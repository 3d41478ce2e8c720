"""Dividing what any sampler yields among the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from fabric_core.data.lengths import sized_len
from fabric_core.errors import InvalidTypeError
from fabric_core.seeding import temporary_seed

_OPT_OUT = "pass use_distributed_sampler=False and let each rank take its own share"


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Each rank gets every n-th item of one and the same pass over ``sampler``, so all ranks together see it once.

    The pass happens on every rank, with Python's, numpy's and torch's global generators set from ``seed + epoch`` for
    its duration: ranks agree even if they have drawn different amounts of random numbers before. A sampler with a
    generator of its own has to have it in the same state everywhere.

    As with ``DistributedSampler``, ranks get equally many items: the first ones are repeated to fill up, or with
    ``drop_last`` the last ones left out.

    Args:
        sampler: yields indices, or anything else; needs a length.
        num_replicas: how many ranks there are; default: the size of the process group.
        rank: which of them this is; default: the rank in the process group.
        shuffle: whether to permute what the sampler yields.
        seed: the same on all ranks.
        drop_last: see above.

    Raises:
        InvalidTypeError: the sampler has no finite length, or yields more than its length.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self._length_of(sampler)
        super().__init__(
            sampler,  # type: ignore[arg-type] # it is asked for its length only
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.sampler = sampler

    def __len__(self) -> int:
        length = self._length_of(self.sampler)
        return length // self.num_replicas if self.drop_last else math.ceil(length / self.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        length = self._length_of(self.sampler)
        with temporary_seed(self.seed + self.epoch):
            items = list(islice(self.sampler, length + 1))
            if self.shuffle:
                items = [items[index] for index in torch.randperm(len(items)).tolist()]
        if len(items) > length:
            raise InvalidTypeError(
                f"{type(self.sampler).__name__} yields more items than its length of {length}, so ranks cannot share "
                f"them: correct its __len__, or {_OPT_OUT}."
            )
        share = math.ceil(len(items) / self.num_replicas)
        whole = len(items) // self.num_replicas * self.num_replicas if self.drop_last else share * self.num_replicas
        return islice(islice(cycle(items), whole), self.rank, None, self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of the next pass; passed on to ``sampler`` if it has ``set_epoch``."""
        super().set_epoch(epoch)
        if callable(inner := getattr(self.sampler, "set_epoch", None)):
            inner(epoch)

    @staticmethod
    def _length_of(sampler: object) -> int:
        length = sized_len(sampler)
        if length is None:
            raise InvalidTypeError(
                f"{type(sampler).__name__} has no finite length, so ranks cannot share what it yields: "
                f"give it a __len__, or {_OPT_OUT}."
            )
        return length
