"""Moving tensors between ranks for checkpoints: parts to rank 0, wholes from rank 0. One tensor at a time.

They travel over the default process group, that of the training, which has a backend for the parameters' device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_core.checkpoint.dtensors import local_of
from fabric_core.checkpoint.sharded.boxes import box_of, is_dtensor, part_of, volume
from fabric_core.distributed.group import carrying_device
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.checkpoint.sharded.stored import Box


class Carrier:
    """Brings tensors from rank 0 to all, one after the other, through memory that is allocated once.

    Every rank makes one, and calls ``broadcast`` for the same tensors. Nothing is sent before, so that a rank without
    enough memory can say so.

    Args:
        size: of the largest tensor, in bytes.
    """

    def __init__(self, size: int) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._carried = self._memory.to(carrying_device(self._memory.device))

    def place(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor in host memory, with undefined values. The next one takes its place."""
        return self._memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values in everybody's ``tensor``, which is the latest ``place``."""
        mine, carried = self._memory[: tensor.nbytes], self._carried[: tensor.nbytes]
        if carried.device == mine.device:
            dist.broadcast(mine, 0)
            return
        if dist.get_rank() == 0:
            carried.copy_(mine)
        dist.broadcast(carried, 0)
        mine.copy_(carried)


def send(tensor: Tensor, rank: int) -> None:
    """Hand the tensor to ``rank``, which calls ``receive`` at the same point."""
    dist.send(_bytes(tensor.to(carrying_device(tensor.device)).contiguous()), rank)


def receive(destination: Tensor, rank: int, kind: torch.device) -> None:
    """Fill ``destination`` with what ``rank`` sends; ``kind`` is the kind of device that the sender has it on."""
    device = carrying_device(kind)
    if destination.device == device and destination.is_contiguous():
        dist.recv(_bytes(destination), rank)
        return
    buffer = torch.empty(destination.shape, dtype=destination.dtype, device=device)
    dist.recv(_bytes(buffer), rank)
    destination.copy_(buffer)


def _bytes(tensor: Tensor) -> Tensor:
    # No backend knows every dtype, and all know bytes.
    return tensor.detach().view(-1).view(torch.uint8)


class Gatherer:
    """Brings tensors that are spread to rank 0, one by one, from whichever ranks hold a part; others keep nothing.

    Every rank makes one for the same tensors, and then calls ``gather`` for each in the same order.

    Args:
        tensors: all that will be gathered; those that are not spread are left out.
        ranks: all ranks of the default process group. They exchange what they hold; tensors take no other group.
    """

    def __init__(self, tensors: Iterable[Any], ranks: Ranks) -> None:
        spread = [tensor for tensor in tensors if is_dtensor(tensor)]
        self._rank = ranks.rank
        # One exchange for all: which rank holds what cannot be told by one rank for every kind of placement.
        held = ranks.gather([box_of(tensor) for tensor in spread])
        if len({len(boxes) for boxes in held}) > 1:
            raise CheckpointError(
                f"The ranks hold different numbers of sharded tensors: {[len(boxes) for boxes in held]}. Every rank "
                "must save the same objects."
            )
        self._sources = {id(tensor): _cover(tensor, [boxes[i] for boxes in held]) for i, tensor in enumerate(spread)}
        self._kept = spread  # so that no id is used twice

    def gather(self, tensor: Tensor) -> Tensor | None:
        """The whole tensor in host memory on rank 0, ``None`` elsewhere."""
        local = local_of(tensor)
        sources = self._sources[id(tensor)]
        if self._rank != 0:
            if self._rank in sources:
                send(local, 0)
            return None
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for rank, box in sources.items():
            if rank == 0:
                part_of(whole, box).copy_(local)
            else:
                receive(part_of(whole, box), rank, local.device)
        return whole


def _cover(tensor: Tensor, boxes: list[Box]) -> dict[int, Box]:
    """The ranks whose parts together are the tensor, each part once."""
    first: dict[Box, int] = {}
    for rank, box in enumerate(boxes):
        if volume(box.sizes):
            first.setdefault(box, rank)
    covered = sum(volume(box.sizes) for box in first)
    if covered != tensor.numel():
        raise CheckpointError(
            f"The ranks hold {covered} of the {tensor.numel()} elements of a tensor of shape {tuple(tensor.shape)}."
        )
    return {rank: box for box, rank in first.items()}
