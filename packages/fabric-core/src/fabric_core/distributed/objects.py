"""Broadcasting any picklable object."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def broadcast_object(obj: T, src: int = 0, device: torch.device | None = None) -> T:
    """The object that global rank ``src`` passed, on every rank. Every rank calls it; others may pass anything."""
    box: list[T | None] = [obj if dist.get_rank() == src else None]
    dist.broadcast_object_list(box, src, device=device)
    return box[0]  # type: ignore[return-value]
