"""Steps that every rank takes, or none goes on after."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks

T = TypeVar("T")


def together(ranks: Ranks | None, action: Callable[[], T], failed: str) -> T:
    """What ``action`` returns here, once it has succeeded on every rank. Every rank calls it.

    Args:
        ranks: ``None`` for a process on its own.
        action: runs on every rank, and ends in the same way as far as the ranks' exchanges go.
        failed: what did not happen if a rank fails, as the beginning of the other ranks' message.

    Raises:
        Exception: what ``action`` raised here.
        CheckpointError: it failed on another rank, which is named.
    """
    if ranks is None or ranks.size == 1:
        return action()
    try:
        result = action()
    except Exception as error:
        ranks.gather(f"{type(error).__name__}: {error}")
        raise
    for rank, text in enumerate(ranks.gather("")):
        if text:
            raise CheckpointError(f"{failed}, because rank {rank} cannot: {text}")
    return result
