"""Who this process is among the processes of a job, and how it talks to the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Communicator(ABC):
    """Ranks and collectives. Every rank calls a collective, in the same order; defaults are those of one process."""

    @property
    def global_rank(self) -> int:
        """Rank among all processes."""
        return 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node."""
        return 0

    @property
    def node_rank(self) -> int:
        """Rank of this node."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` for splitting a data set; ``None`` if every process sees all of it."""
        return None

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """The device of this process."""

    @property
    @abstractmethod
    def is_global_zero(self) -> bool:
        """Whether this process has rank 0 among all."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Shape ``(...)`` on each rank to ``(world_size, ...)`` on every rank."""

    @abstractmethod
    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce in place; the same value on every rank."""

    @abstractmethod
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks (or any, with ``all=False``) decided True."""

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Return once every rank has called it."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of global rank ``src``, on every rank."""
