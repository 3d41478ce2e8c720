"""The processes that write or read one checkpoint together, and how they exchange small objects."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

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

    Every process of the group must use what this returns in the same order. Nothing is sent through other groups. A
    ``group`` of gloo serves even after ``destroy_process_group()``, which programs call at their end while a thread
    still writes.
    """
    if group is None:
        return GroupRanks() if is_initialized() else LoneRank()
    import torch.distributed as dist

    return GlooRanks(group) if dist.get_backend(group) == "gloo" else GroupRanks(group)


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


class GlooRanks:
    """The processes of a gloo group, whose connections this object keeps.

    The functions of ``torch.distributed`` refuse a group that was destroyed. This calls gloo itself, whose connections
    last as long as somebody holds it, and end with one of the processes: then the others get a ``RuntimeError``.
    """

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._gloo: Any = group._get_backend(torch.device("cpu"))
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def broadcast(self, obj: T) -> T:
        """Rank 0's object on every rank; others may pass anything."""
        content = _packed(obj) if self.rank == 0 else _room(0)
        size = self._sent(torch.tensor([content.numel()]))
        result: T = _unpacked(self._sent(content if self.rank == 0 else _room(int(size))))
        return result

    def gather(self, obj: T) -> list[T]:
        """Every rank's object by rank, on every rank."""
        content = _packed(obj)
        sizes = self._sizes(content)
        boxes = [_room(max(sizes)) for _ in sizes]
        self._gloo.allgather([boxes], [_padded(content, max(sizes))]).wait()
        return [_unpacked(box[:size]) for box, size in zip(boxes, sizes, strict=True)]

    def collect(self, obj: T) -> list[T] | None:
        """Every rank's object by rank on rank 0, ``None`` elsewhere."""
        content = _packed(obj)
        sizes = self._sizes(content)
        boxes = [_room(max(sizes)) for _ in sizes] if self.rank == 0 else []
        options = self._dist.GatherOptions()
        options.rootRank = 0
        self._gloo.gather([boxes] if boxes else [], [_padded(content, max(sizes))], options).wait()
        return [_unpacked(box[:size]) for box, size in zip(boxes, sizes, strict=True)] if boxes else None

    def hand_out(self, objects: list[T] | None) -> T:
        """The object that rank 0 has for this rank; others pass ``None``."""
        contents = [_packed(obj) for obj in objects or ()] if self.rank == 0 else []
        known = [content.numel() for content in contents] or [0] * self.size
        sizes = self._sent(torch.tensor(known)).tolist()
        box = _room(max(sizes))
        options = self._dist.ScatterOptions()
        options.rootRank = 0
        sent = [[_padded(content, max(sizes)) for content in contents]] if contents else []
        self._gloo.scatter([box], sent, options).wait()
        result: T = _unpacked(box[: sizes[self.rank]])
        return result

    def _sent(self, tensor: Tensor) -> Tensor:
        """``tensor``, filled with rank 0's."""
        options = self._dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._gloo.broadcast([tensor], options).wait()
        return tensor

    def _sizes(self, content: Tensor) -> list[int]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._gloo.allgather([sizes], [torch.tensor([content.numel()])]).wait()
        return [int(size) for size in sizes]


def _packed(obj: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _unpacked(content: Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())


def _room(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _padded(content: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(content, (0, size - content.numel()))
