"""The processes that write or read one checkpoint together, and how they exchange small objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fabric_core.distributed.group import is_initialized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks(Protocol):
    """Who takes part. All methods are collective, and wait no longer than the group's timeout.

    Attributes:
        rank: this process's number among those that take part, from 0.
        size: how many take part.
    """

    rank: int
    size: int

    def broadcast(self, obj: T) -> T:
        """Rank 0's object on every rank; others may pass anything."""
        ...

    def gather(self, obj: T) -> list[T]:
        """Every rank's object by rank, on every rank."""
        ...

    def collect(self, obj: T) -> list[T] | None:
        """Every rank's object by rank on rank 0, ``None`` elsewhere."""
        ...

    def hand_out(self, objects: list[T] | None) -> T:
        """The object that rank 0 has for this rank; others pass ``None``."""
        ...


def ranks_of(group: ProcessGroup | None = None) -> Ranks:
    """The processes of ``group``; without one, those of the default group, or this process alone if there is none.

    Every process of the group must use what this returns in the same order. Nothing is sent through other groups.
    """
    if group is None and not is_initialized():
        return LoneRank()
    return GroupRanks(group)


class LoneRank:
    """A process on its own."""

    rank = 0
    size = 1

    def broadcast(self, obj: T) -> T:
        """``obj``."""
        return obj

    def gather(self, obj: T) -> list[T]:
        """``[obj]``."""
        return [obj]

    def collect(self, obj: T) -> list[T] | None:
        """``[obj]``."""
        return [obj]

    def hand_out(self, objects: list[T] | None) -> T:
        """The only one of ``objects``."""
        assert objects is not None
        return objects[0]


class GroupRanks:
    """The processes of a group of ``torch.distributed``; ``None`` is the default group."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._first = 0 if group is None else dist.get_global_rank(group, 0)

    def broadcast(self, obj: T) -> T:
        """Rank 0's object on every rank; others may pass anything."""
        box: list[Any] = [obj if self.rank == 0 else None]
        self._dist.broadcast_object_list(box, self._first, self._group)
        result: T = box[0]
        return result

    def gather(self, obj: T) -> list[T]:
        """Every rank's object by rank, on every rank."""
        box: list[Any] = [None] * self.size
        self._dist.all_gather_object(box, obj, self._group)
        return box

    def collect(self, obj: T) -> list[T] | None:
        """Every rank's object by rank on rank 0, ``None`` elsewhere."""
        box: list[Any] | None = [None] * self.size if self.rank == 0 else None
        self._dist.gather_object(obj, box, self._first, self._group)
        return box

    def hand_out(self, objects: list[T] | None) -> T:
        """The object that rank 0 has for this rank; others pass ``None``."""
        box: list[Any] = [None]
        self._dist.scatter_object_list(box, objects if self.rank == 0 else None, self._first, self._group)
        result: T = box[0]
        return result
