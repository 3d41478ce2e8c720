"""Checkpoints written in the background: the program waits while its state is copied, not while it is written."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.staging import HostBuffers, stage
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.write import write_checkpoint
from fabric_core.distributed.background import BackgroundWork
from fabric_core.errors import InvalidTypeError
from fabric_core.keywords import accepted

if TYPE_CHECKING:
    import torch.distributed as dist

    from fabric_core.types import MapLocation, Path

log = logging.getLogger("fabric_core")


class AsyncCheckpointIO(CheckpointIO):
    """Writes through another checkpoint IO, in a thread, while the program goes on: ``Fabric(checkpoint_io="async")``.

    ``save_checkpoint`` returns once the state is copied to host memory; what the program changes afterwards does not
    show. One save is in flight: the next one waits for it, and raises what it raised, as do ``drain``, loading,
    removing and ``teardown``; the new save is then not begun. What is in flight at the end of the program, or when an
    exception or Ctrl-C ends it, is written first; if that fails, the error is printed and the exit code is 1. A process
    that is killed, by SIGTERM too, leaves what was at the path before.

    The copy's memory, page-locked for tensors of an accelerator, is kept for the next save, until ``teardown``. Use one
    object from one thread.

    Args:
        checkpoint_io: what writes and reads; files in torch's format if not given.

    Attributes:
        checkpoint_io: the same.
        blocked_seconds: how long the last save kept this process waiting: for the one before, and for the copy.
        total_blocked_seconds: the same for all saves so far.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        if checkpoint_io is not None and (
            not isinstance(checkpoint_io, CheckpointIO) or isinstance(checkpoint_io, AsyncCheckpointIO)
        ):
            raise InvalidTypeError(
                f"AsyncCheckpointIO({checkpoint_io!r}): expected a CheckpointIO that writes in the foreground, such as "
                "TorchCheckpointIO(); an instance, not a class or a name."
            )
        self.checkpoint_io = checkpoint_io or TorchCheckpointIO()
        self.blocked_seconds = 0.0
        self.total_blocked_seconds = 0.0
        self._buffers = HostBuffers()
        self._work: BackgroundWork | None = None
        self._began: float | None = None
        self._waited = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"checkpoint_io": self.checkpoint_io}  # neither threads nor buffers go to another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """Copy ``checkpoint``, and write the copy in the background.

        Raises:
            CheckpointError: something in ``checkpoint`` cannot be pickled; nothing was begun.
            Exception: whatever the save before raised; nothing was begun.
        """
        copied = self.stage(checkpoint)
        self.submit(lambda: write_checkpoint(self.checkpoint_io, path, copied, storage_options), path)

    def stage(self, tree: Any) -> Any:
        """A copy of ``tree`` in host memory, for a function given to ``submit``. It holds until the next call.

        Waits for the save in flight, whose copy it overwrites, and raises its error. DTensors become DTensors around a
        copy of this rank's part; every rank copies its own, without collectives.
        """
        began = time.perf_counter()
        self.drain()
        self._waited = time.perf_counter() - began
        copied = stage(tree, self._buffers)
        self._began = began
        return copied

    def submit(self, write: Callable[[], object], path: Path) -> None:
        """Run ``write`` in the background, once the save in flight has ended; raise the error of that one.

        Args:
            write: must leave what was at ``path`` if it is killed. Its collectives go over ``background_group()``;
                those of ``ranks_of(background_group())`` do not fail when the program leaves the main group.
            path: for messages.
        """
        now = time.perf_counter()
        began, waited = (now, 0.0) if self._began is None else (self._began, self._waited)
        self._began = None
        self.drain()
        waited += time.perf_counter() - now
        self._work = BackgroundWork(write, f"Writing the checkpoint {os.fspath(path)!r}")
        self.blocked_seconds = time.perf_counter() - began
        self.total_blocked_seconds += self.blocked_seconds
        log.debug(
            "saving %s in the background blocked for %.3f s, %.3f s of it for the save before",
            os.fspath(path),
            self.blocked_seconds,
            waited,
        )

    def drain(self) -> None:
        """Wait until nothing is being written; raise what the save in flight raised."""
        if self._work is not None:
            self._work.wait()  # Ctrl-C leaves it in flight
            work, self._work = self._work, None
            work.settle()

    def load_checkpoint(
        self, path: Path, map_location: MapLocation = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, after the save in flight."""
        self.drain()
        inner = self.checkpoint_io
        keywords = accepted(inner.load_checkpoint, {"map_location": map_location, "weights_only": weights_only})
        return inner.load_checkpoint(path, **keywords)

    @contextmanager
    def open_checkpoint(self, path: Path, weights_only: bool | None = None) -> Iterator[OpenCheckpoint]:
        """The checkpoint, opened as the inner IO opens it, after the save in flight."""
        from fabric_core.checkpoint.opening import open_file

        self.drain()
        with open_file(self.checkpoint_io, path, weights_only) as opened:
            yield opened

    def remove_checkpoint(self, path: Path) -> None:
        """Remove a checkpoint, after the save in flight."""
        self.drain()
        self.checkpoint_io.remove_checkpoint(path)

    def teardown(self) -> None:
        """Finish the save in flight, raise what it raised, and free the memory of the copy."""
        try:
            self.drain()
        finally:
            self._buffers = HostBuffers()
            self.checkpoint_io.teardown()


_group: weakref.ref[dist.ProcessGroup] | None = None
_group_of: weakref.ref[dist.ProcessGroup] | None = None


def background_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for collectives of background threads; ``None`` in a process without a group.

    It is made at the first call, which every rank makes together, and again after the main group was left and joined
    anew. Torch destroys it with the main group; an exchange over ``ranks_of`` it goes on, and lets a save finish.

    Args:
        timeout: how long its collectives wait for the other ranks; torch's default if not given. The first call counts.
    """
    global _group, _group_of  # held weakly: a group that somebody holds keeps its connections after it was destroyed
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    main = dist.group.WORLD
    known = _group() if _group is not None and _group_of is not None and _group_of() is main else None
    if known is not None:
        return known
    made: Any = dist.new_group(backend="gloo", timeout=timeout)
    _group, _group_of = weakref.ref(made), weakref.ref(main)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]
