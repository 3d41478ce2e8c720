"""Doing something once, not once per process: on the process of rank 0, or once per message.

The rank is read from the environment when it is first needed, and can be set::

    rank_zero_only.rank = 1
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from fabric_core.errors import InvalidTypeError
from fabric_core.settings import JSM_NAMESPACE_RANK, LOCAL_RANK, RANK, SLURM_PROCID
from fabric_core.warnings import FabricDeprecationWarning

P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D")

log = logging.getLogger("fabric_core")


def rank_from_environment() -> int | None:
    """The rank that the launcher of this process put into the environment, ``None`` if there was no launcher."""
    for setting in (RANK, LOCAL_RANK, SLURM_PROCID, JSM_NAMESPACE_RANK):
        rank = setting.integer()
        if rank is not None:
            return rank
    return None


class RankZeroOnly:
    """The decorator ``rank_zero_only``; there is one object of this class, which holds the process's rank."""

    def __init__(self) -> None:
        self._rank: int | None = None

    @property
    def known_rank(self) -> int | None:
        """The rank as far as it is known by now; asking does not look it up. ``rank`` may be set to it later."""
        return self._rank

    @property
    def rank(self) -> int:
        """This process's rank: what was assigned, else what the environment says at the first use, else 0."""
        if self._rank is None:
            self._rank = rank_from_environment() or 0
        return self._rank

    @rank.setter
    def rank(self, rank: int | None) -> None:
        # None: read the environment again at the next use.
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
            raise InvalidTypeError(f"rank_zero_only.rank must be an int, got {rank!r}.")
        self._rank = rank

    @overload
    def __call__(self, fn: Callable[P, T]) -> Callable[P, T | None]: ...
    @overload
    def __call__(self, fn: Callable[P, T], default: D) -> Callable[P, T | D]: ...

    def __call__(self, fn: Callable[P, T], default: Any = None) -> Callable[P, Any]:
        """A function that runs ``fn`` on rank 0 and returns ``default`` elsewhere, decided at each call."""

        @functools.wraps(fn)
        def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> Any:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return on_rank_zero


rank_zero_only = RankZeroOnly()


def rank_zero_debug(message: object, *args: object, stacklevel: int = 1, **kwargs: Any) -> None:
    """Log at level DEBUG on rank 0; the record names the line that calls this."""
    _log(logging.DEBUG, message, *args, stacklevel=stacklevel, **kwargs)


def rank_zero_info(message: object, *args: object, stacklevel: int = 1, **kwargs: Any) -> None:
    """Log at level INFO on rank 0; the record names the line that calls this."""
    _log(logging.INFO, message, *args, stacklevel=stacklevel, **kwargs)


def _log(level: int, message: object, *args: object, stacklevel: int, **kwargs: Any) -> None:
    if rank_zero_only.rank == 0:
        log.log(level, message, *args, stacklevel=stacklevel + 2, **kwargs)


def rank_zero_warn(message: str | Warning, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Warn on rank 0. ``stacklevel`` counts as in ``warnings.warn``: 1 names the line that calls this."""
    if rank_zero_only.rank == 0:
        warnings.warn(message, category, stacklevel=stacklevel + 1)


def rank_zero_deprecation(
    message: str, category: type[Warning] = FabricDeprecationWarning, stacklevel: int = 1
) -> None:
    """Warn on rank 0 that something will go away; use ``stacklevel=2`` to name the line that used it."""
    rank_zero_warn(message, category, stacklevel=stacklevel + 1)


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """``message``, led by the rank if there is one."""
    return message if rank is None else f"[rank: {rank}] {message}"


class WarningCache(set[str]):
    """Messages that were already given; each method gives a message the first time only."""

    def warn(self, message: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
        """``rank_zero_warn``, once per message."""
        if self._is_new(message):
            rank_zero_warn(message, category, stacklevel=stacklevel + 1)

    def deprecation(self, message: str, stacklevel: int = 1) -> None:
        """``rank_zero_deprecation``, once per message."""
        if self._is_new(message):
            rank_zero_deprecation(message, stacklevel=stacklevel + 1)

    def info(self, message: str, *args: object, stacklevel: int = 1) -> None:
        """``rank_zero_info``, once per message."""
        if self._is_new(message):
            rank_zero_info(message, *args, stacklevel=stacklevel + 1)

    def _is_new(self, message: str) -> bool:
        if message in self:
            return False
        self.add(message)
        return True
