"""Work that goes on in a thread while the program continues, and that a process does not end without.

Python waits for such work at its end as it waits for threads: before the exit functions run, so that the process group
is still there, and thread pools too. What ends a process in another way, as the launchers do, calls one of the two
functions here first. Nothing can wait when the kernel ends the process: the work must be safe to interrupt.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

from fabric_core.distributed.exit import end_process, run_exit_functions

_BUSY: Final = ".busy"
_unfinished: list[BackgroundWork] = []
_numbers = count()
_report: Path | None = None
_awaited = False
_leaving = False


class BackgroundWork:
    """One call in a thread of its own, begun at once.

    Args:
        function: what to do. It must be safe to be killed in the middle of.
        name: words for messages, such as ``"Writing the checkpoint 'a.ckpt'"``.
    """

    def __init__(self, function: Callable[[], object], name: str) -> None:
        self.name = name
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._marker: Path | None = None
        if not _exit_awaits():  # the program saves while it is ending: nobody would wait for a thread any more
            self._run_here(function)
            return
        self._mark()
        _unfinished.append(self)
        self._thread = threading.Thread(target=self._run, args=(function,), name="fabric-background", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system, or an interpreter about to end, gives no thread
            self._thread = None
            self._run_here(function)

    @property
    def is_own(self) -> bool:
        """Whether it runs in this process, and not in the one that this was forked from."""
        return self._pid == os.getpid()

    def wait(self, limit: float | None = None) -> bool:
        """Whether it has ended, after at most ``limit`` seconds."""
        thread = self._thread
        if thread is None or not self.is_own:
            return True
        # Not just the work: a thread that frees tensors while the interpreter ends aborts the process.
        thread.join(limit)
        return not thread.is_alive()

    def settle(self) -> None:
        """Wait for its end, and raise what it raised. A second call does nothing."""
        self.wait()
        with suppress(ValueError):
            _unfinished.remove(self)
        error, self._error = self._error, None
        if error is not None and self.is_own:
            raise error

    def _run_here(self, function: Callable[[], object]) -> None:
        self._run(function)
        self.settle()

    def _run(self, function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            if hasattr(error, "add_note"):  # from Python 3.11
                error.add_note(f"{self.name} in the background failed. The call that raises this only shows it.")
            self._error = error
        finally:
            if self._marker is not None:
                self._marker.unlink(missing_ok=True)

    def _mark(self) -> None:
        if _report is not None:
            self._marker = _report.with_name(f"{_report.stem}.{next(_numbers)}{_BUSY}")
            with suppress(OSError):  # the folder is gone with the supervisor
                self._marker.touch()


def await_background_work() -> None:
    """Wait until nothing goes on in the background of this process; errors stay for who asks next."""
    for work in _own_work():
        work.wait()


def finish_background_work() -> None:
    """Wait until nothing goes on in the background of this process; raise the first error that nobody has seen yet."""
    errors: list[Exception] = []
    for work in _own_work():
        try:
            work.settle()
        except Exception as error:
            errors.append(error)
    for further in errors[1:]:
        _show(further)
    if errors:
        raise errors[0]


def finish_or_tell(limit: float | None = None) -> bool:
    """The same for the end of a process: errors are printed, and after ``limit`` seconds it gives up.

    Returns:
        Whether all went well.
    """
    deadline = None if limit is None else time.monotonic() + limit
    well = True
    for work in _own_work():
        try:
            if not work.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"it was not done after {limit:g} s")
            work.settle()
        except BaseException as error:  # also Ctrl-C, which ends the waiting only
            well = False
            with suppress(Exception):
                sys.stderr.write(f"{work.name} in the background failed:\n")
            _show(error)
    return well


def announce_at(report: Path) -> None:
    """From now on, work in this process can be seen by another one that calls ``is_busy(report)``."""
    global _report  # one place per process
    _report = report


def is_busy(report: Path) -> bool:
    """Whether the process that announces at ``report`` has work going on, or was killed while it had."""
    return any(report.parent.glob(f"{report.stem}.*{_BUSY}"))


def _own_work() -> list[BackgroundWork]:
    _unfinished[:] = [work for work in _unfinished if work.is_own]
    return list(_unfinished)


def _exit_awaits() -> bool:
    """See to it that the end of this process waits; whether it still can."""
    global _awaited  # one registration, which a forked process inherits
    if _leaving or _awaited:
        return not _leaving
    import concurrent.futures.thread  # noqa: F401 - what it registers ends all thread pools, and must come after ours

    # Python calls what is registered there, under no public name, before it waits for threads. The exit functions,
    # which are the way out elsewhere, are too late for work that needs a thread pool.
    register: Callable[[Callable[[], None]], Any] = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(_finish_at_exit)
    except RuntimeError:
        return False
    _awaited = True
    return True


def _finish_at_exit() -> None:
    global _leaving  # what is begun from now on is done in the foreground
    well = finish_or_tell()
    _leaving = True
    if any(not work.wait(0) for work in _own_work()):  # Ctrl-C has ended the waiting
        atexit.register(_end_with, 130)
    elif not well and getattr(sys, "last_value", None) is None:  # no exception sets the exit code already
        atexit.register(_end_with, 1)


def _end_with(code: int) -> None:
    """End with this exit code, which no exit function can bring about by raising, and without finalising.

    It is the last to be registered and so the first to run: it has the others run, and Python not come back to them.
    """
    atexit.unregister(_end_with)
    run_exit_functions()
    end_process(code)


def _show(error: BaseException) -> None:
    with suppress(Exception):
        traceback.print_exception(type(error), error, error.__traceback__)
