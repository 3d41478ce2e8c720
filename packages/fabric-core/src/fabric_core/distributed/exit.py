"""Ending a process that used ``torch.distributed``, without being aborted on the way out.

A thread of the gloo backend may drop its reference to a Python object a moment after the collective has returned. If
the interpreter is being finalised at that moment, the thread cannot take the lock of the interpreter any more, and the
process dies with SIGABRT ("terminate called without an active exception") after all its work was done.
``end_process`` leaves without finalising; ``protect_exit`` lets such threads finish before finalising begins.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

_BUSY_THREADS: Final = "pt_gloo"
_LEAVE_LIMIT: Final = 2.0
_IDLE_LIMIT: Final = 0.5
_PAUSE: Final = 0.005
_FILE: Final[type] = io.IOBase.__mro__[1]  # without the metaclass of an ABC, which asks the objects themselves
_COMPRESSED: Final = frozenset({"gzip", "bz2", "lzma"})
_protected = False


def end_process(code: int = 0) -> NoReturn:
    """End this process now with ``code``: output is flushed, nothing else runs, nothing can abort it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, replaced, or nobody reads it any more
            stream.flush()
    os._exit(code)


def open_files() -> list[Any]:
    """The file objects of this process that somebody still holds."""
    return [item for item in gc.get_objects() if issubclass(type(item), _FILE)]


def flush_open_files(spared: Iterable[Any] = ()) -> None:
    """Write out what files that nobody closed still hold back, as finalising does; not those in ``spared``."""
    skipped = {id(file) for file in spared}
    if not skipped:  # in a forked process, what is frozen is inherited
        gc.unfreeze()
    files = [file for file in open_files() if id(file) not in skipped]
    # From the outside to the inside: text, compression, bytes.
    for file in sorted(files, key=_depth):
        with suppress(Exception):
            if not file.closed and file.writable():
                file.close() if type(file).__module__ in _COMPRESSED else file.flush()


def _depth(file: Any) -> int:
    if issubclass(type(file), io.TextIOWrapper):
        return 0
    return 2 if issubclass(type(file), (io.BufferedWriter, io.BufferedRandom)) else 1


def flush_within(limit: float) -> None:
    """The same from a thread, because a file may be locked by another thread that is stuck in a write."""
    helper = threading.Thread(target=flush_open_files, name="fabric-flush", daemon=True)
    helper.start()
    helper.join(limit)


def run_exit_functions(
    limit: float | None = None,
    code: int = 0,
    functions: Callable[[], object] | None = None,
    spared: Iterable[Any] = (),
) -> None:
    """Do what Python does before finalising: wait for non-daemon threads, run the ``atexit`` functions, flush files.

    If that takes longer than ``limit`` seconds, the process ends with ``code`` in the middle of it. A forked process
    has inherited exit functions and files: it names its own ``functions``, and the files that are to be ``spared``.
    """
    if limit is not None:
        watchdog = threading.Timer(limit, end_process, (code,))
        watchdog.daemon = True
        watchdog.start()
        flush_open_files(spared)
    # What the interpreter itself calls, under no public name.
    own = functions or getattr(atexit, "_run_exitfuncs", None)
    for step in (getattr(threading, "_shutdown", None), own):
        if step is not None:
            with suppress(BaseException):  # the function has printed its own traceback, the next ones still run
                step()
    with suppress(BaseException):
        flush_open_files(spared)


def leave_from_hook(code: int) -> None:
    """From an exception hook, end this process now, unless another hook has called it and still has work to do.

    Finalising an interpreter that has loaded torch takes up to a second, which a failed job does not have.
    """
    if sys._getframe(1).f_back is None:
        run_exit_functions()
        end_process(code)


def protect_exit() -> None:
    """From now on, a normal end of this process leaves its process group first and then waits for gloo's threads.

    The exit code stays what it would have been. The wait is a few milliseconds, and bounded.
    """
    global _protected  # one registration for each process
    if not _protected:
        _protected = True
        atexit.register(leave_cleanly)


def leave_cleanly() -> None:
    """Destroy the process group if there is one, and return once no thread of gloo has work left."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available():
        return
    if dist.is_initialized():
        _leave_within_limit(dist)
    wait_for_idle_threads()


def _leave_within_limit(dist: Any) -> None:
    """Destroy the group in a thread, because some backends block here for as long as another rank is stuck."""

    def destroy() -> None:
        with suppress(Exception):  # a peer that died first makes this fail, which is no news at this point
            dist.destroy_process_group()

    helper = threading.Thread(target=destroy, name="fabric-leave-group", daemon=True)
    helper.start()
    helper.join(_LEAVE_LIMIT)


def wait_for_idle_threads() -> None:
    """Return once gloo's threads were seen asleep twice, with the interpreter's lock free in between.

    A thread that waits for the lock also looks asleep; the pause lets it have the lock. Where the system does not
    show threads, wait for a fixed time.
    """
    if not Path("/proc/self/task").is_dir():
        time.sleep(0.1)
        return
    deadline = time.monotonic() + _IDLE_LIMIT
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        quiet = 0 if _any_busy() else quiet + 1


def _any_busy() -> bool:
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread ended meanwhile
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if name.startswith(_BUSY_THREADS) and rest.split()[0] != "S":
                return True
    return False
