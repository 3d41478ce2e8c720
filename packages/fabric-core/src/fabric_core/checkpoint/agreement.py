"""Steps that every rank takes, or none goes on after."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fabric_core import errors
from fabric_core.errors import CheckpointError, FabricError

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
        OSError, FabricError: it failed on another rank, which is named, with an error of the same builtin or Fabric
            class: what a program catches, it catches on every rank.
        CheckpointError: it failed on another rank with any other error.
    """
    if ranks is None or ranks.size == 1:
        return action()
    try:
        result = action()
    except Exception as error:
        ranks.gather(_told(error, failed, ranks.rank))
        raise
    for problem in ranks.gather(None):
        if problem is not None:
            raise problem
    return result


def _told(error: Exception, failed: str, rank: int) -> Exception:
    """The error for the other ranks."""
    text = f"{failed}, because rank {rank} cannot: {type(error).__name__}: {error}"
    kind = next((base for base in type(error).__mro__ if _is_shared(base)), CheckpointError)
    try:
        if isinstance(error, OSError) and issubclass(kind, OSError) and error.errno is not None:
            reason = f"{error.strerror} (on rank {rank})"
            told: Exception = kind(error.errno, reason, error.filename, None, error.filename2)
        else:
            told = kind(text)
        pickle.loads(pickle.dumps(told))
    except Exception:  # a file name that cannot be sent, say; the others must hear of the failure all the same
        return CheckpointError(text)
    return told


def _is_shared(kind: type) -> bool:
    """Whether every rank has the class, and it can be made from a message."""
    if issubclass(kind, FabricError):
        return getattr(errors, kind.__name__, None) is kind
    return issubclass(kind, OSError) and getattr(builtins, kind.__name__, None) is kind
