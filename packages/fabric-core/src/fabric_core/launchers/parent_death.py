"""A worker does not outlive its launcher, whatever ended the launcher.

Two ways at once. On Linux the kernel is asked to kill the worker when its parent ends, which works even while the
worker is stuck in native code. Everywhere, a thread of the worker waits for the parent's end: on POSIX systems by
reading from a pipe whose other end only the parent holds, on Windows by waiting for the process itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_SYNCHRONIZE: Final = 0x00100000
_ORPHANED: Final = 137
_held: set[int] = set()
_forks_watched = False


class Lifeline:
    """The parent's end: workers that hold ``worker_fd`` notice when this process is gone."""

    def __init__(self) -> None:
        self.worker_fd, self._own_fd = os.pipe()
        _close_in_forked_children(self._own_fd)

    def close(self) -> None:
        """Give both ends back, once all workers have ended."""
        if self._own_fd in _held:
            _held.discard(self._own_fd)
            os.close(self.worker_fd)
            os.close(self._own_fd)


def die_with_parent(parent: int, by_signal: bool = True) -> None:
    """Ask the kernel to kill this process when process ``parent`` ends; end at once if it has ended already.

    ``by_signal`` is to be False if the parent started this process from a thread that may end early: for the kernel,
    it is the thread that counts.
    """
    if by_signal and sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # a libc without prctl: the thread remains
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(_ORPHANED)


def watch_lifeline(fd: int) -> None:
    """End this process when the pipe's other end closes."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(fd, 1)

    watch_until(wait)


def watch_process(pid: int) -> None:
    """End this process when process ``pid`` ends. Windows only: elsewhere there is a pipe."""
    if sys.platform == "win32":
        import ctypes

        kernel = ctypes.windll.kernel32
        handle = kernel.OpenProcess(_SYNCHRONIZE, False, pid)
        if handle:
            watch_until(lambda: kernel.WaitForSingleObject(handle, 0xFFFFFFFF))


def watch_until(wait: Callable[[], object]) -> None:
    """End this process, without any clean-up, as soon as ``wait()`` returns in a thread of its own."""

    def watch() -> None:
        wait()
        os._exit(_ORPHANED)

    threading.Thread(target=watch, name="fabric-parent-watch", daemon=True).start()


def _close_in_forked_children(fd: int) -> None:
    """A forked child, such as a data loader's worker, must not keep the pipe open after this process is gone."""
    global _forks_watched  # a registration cannot be undone, so there is one for each process
    _held.add(fd)
    if not _forks_watched and hasattr(os, "register_at_fork"):
        _forks_watched = True
        os.register_at_fork(after_in_child=_close_held)


def _close_held() -> None:
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())
