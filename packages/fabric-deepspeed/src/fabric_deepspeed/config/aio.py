"""How tensors are read from and written to NVMe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fabric_deepspeed.config.keywords import Path
from fabric_deepspeed.config.section import Section, switch, whole


@dataclass(frozen=True)
class AioConfig(Section):
    """The section ``aio``: asynchronous reading and writing, used where something is offloaded to NVMe.

    Attributes:
        block_size: bytes read or written at a time.
        queue_depth: requests in flight.
        intra_op_parallelism: threads for one tensor; releases of old called it ``thread_count``.
        single_submit: submit requests one by one instead of in batches.
        overlap_events: let submitting and completing overlap.
    """

    path: ClassVar[Path] = ("aio",)

    block_size: int = whole(1048576, least=1)
    queue_depth: int = whole(8, least=1)
    intra_op_parallelism: int = whole(1, least=1)
    single_submit: bool = switch(False)
    overlap_events: bool = switch(True)
