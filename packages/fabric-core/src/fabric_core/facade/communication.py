"""Talking to the other processes."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from fabric_core.collections import convert_to_tensors
from fabric_core.distributed.coalesce import gather_nested, reduce_nested
from fabric_core.distributed.group import is_initialized
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UsageError
from fabric_core.facade.base import FabricBase


class Communication(FabricBase):
    """``print``, ``barrier``, ``broadcast``, ``all_gather``, ``all_reduce`` and ``rank_zero_first``."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on the first process of each node."""
        if self.local_rank == 0:
            builtins.print(*args, **kwargs)  # noqa: T201 - this is what the method is for

    def barrier(self, name: str | None = None) -> None:
        """Return once every rank has called it."""
        self._require_launch("barrier")
        self._strategy.barrier(name=name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object that global rank ``src`` passed, on every rank. Every rank calls it."""
        self._require_launch("broadcast")
        if isinstance(src, bool) or not isinstance(src, int) or not 0 <= src < self.world_size:
            error = InvalidTypeError if isinstance(src, bool) or not isinstance(src, int) else InvalidArgumentError
            raise error(f"fabric.broadcast(src={src!r}): expected a global rank, 0 to {self.world_size - 1}.")
        return self._strategy.broadcast(obj, src=src)

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Every rank's values on every rank. Every rank calls it, with the same shapes.

        Args:
            data: tensors of shape ``(...)``, numbers or arrays, or a nested collection of them. Small ones travel
                together.
            group: a process group; all processes if not given.
            sync_grads: let gradients flow back to the rank that a value came from.

        Returns:
            The same collection with tensors of shape ``(world_size, ...)``; with one process the shapes stay.
        """
        self._require_launch("all_gather")
        data = convert_to_tensors(data, self.device)
        if self.world_size == 1:
            return data
        return gather_nested(data, lambda t: self._strategy.all_gather(t, group=group, sync_grads=sync_grads))

    def all_reduce(self, data: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce values over ranks, tensors in place. Every rank calls it, with the same shapes.

        Args:
            data: tensors, numbers or arrays, or a nested collection of them. Small ones travel together.
            group: a process group; all processes if not given.
            reduce_op: ``"mean"``, ``"sum"``, ``"min"``, ``"max"``, ``"product"`` or a ``ReduceOp``.
        """
        self._require_launch("all_reduce")
        data = convert_to_tensors(data, self.device, contiguous=False)  # a copy would not be the caller's tensor
        if self.world_size == 1:
            return data
        return reduce_nested(data, lambda t: self._strategy.all_reduce(t, group=group, reduce_op=reduce_op))

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Rank 0 runs the body first; the others start when it is done, however long it takes.

        Args:
            local: the first process of each node goes first instead, for folders that nodes do not share.

        Raises:
            RuntimeError: on the other ranks, when the body failed on a rank that went first.
        """
        if self.world_size == 1 or not self.is_launched:  # nobody else is there, or not yet
            yield
            return
        first = (self.local_rank if local else self.global_rank) == 0
        if not first and self._any_failed(False):
            raise UsageError("fabric.rank_zero_first(): the body failed on a rank that went first; see its error.")
        failed = True
        try:
            yield
            failed = False
        finally:
            if first:
                self._any_failed(failed)

    def _any_failed(self, failed: bool) -> bool:
        """Whether any rank failed; returns once every rank has called it, without the group's usual time limit."""
        if not is_initialized():  # a strategy with collectives of its own
            return not self._strategy.reduce_boolean_decision(not failed)
        import torch
        import torch.distributed as dist

        if self._rank_zero_group is None:
            self._rank_zero_group = dist.new_group(backend="gloo", timeout=timedelta(days=10_000))
        vote = torch.tensor(int(failed))
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._rank_zero_group)
        return bool(vote.item())
