"""Watching the processes of a node: the first failure ends all of them, and is what the user gets to see.

One implementation serves every way of launching. It imports nothing heavy and waits without polling: a thread for each
worker blocks until that worker ends, and whatever happens arrives in one queue. Only a job that has failed while its
checkpoint was being written looks, a few times a second, whether that is done.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from fabric_core.distributed.background import is_busy
from fabric_core.launchers.failure import Failure, first_of, from_exit_code

SETTLE: Final = 0.1
"""Seconds to go on listening after a failure was noticed, in case the one that caused it is still on its way."""
GRACE: Final = 0.4
"""Seconds between asking the other workers to end and killing them."""
CLEAN_UP_LIMIT: Final = 0.3
"""Seconds a failed worker has for its exit functions, before it is ended."""
SAVE_PATIENCE: Final = 60.0
"""Seconds that a worker has to finish what it writes in the background, before a failure ends it."""
INTERRUPT_PATIENCE: Final = 2.0
"""Seconds that workers have to end in their own way after Ctrl-C."""
_KILL_LIMIT: Final = 5.0
_LOOK_AGAIN: Final = 0.05
_HEARTBEAT: Final = 1.0 if sys.platform == "win32" else None  # a wait without end cannot be interrupted on Windows
_ENDED_BY_US: Final = frozenset({143, 137, 1})


@dataclass(frozen=True)
class Worker:
    """A running process, as the supervisor needs to know it.

    Attributes:
        rank: rank among all processes.
        wait: blocks until the process ends and returns its exit code, negative for a signal.
        send: sends a signal; no error if the process has ended.
        terminate: asks the process to end.
        kill: ends it.
        report: where it leaves its ``Failure``, and beside it what the interpreter writes when it crashes.
    """

    rank: int
    wait: Callable[[], int]
    send: Callable[[int], None]
    terminate: Callable[[], None]
    kill: Callable[[], None]
    report: Path

    @property
    def crash(self) -> Path:
        """Where the interpreter writes the Python traceback of a crash in native code."""
        return self.report.with_suffix(".crash")


@dataclass(frozen=True)
class Outcome:
    """How the workers ended.

    Attributes:
        first: the failure that came first, ``None`` if every worker ended well.
        failures: all of them.
        signal: the signal on which the supervisor ended the workers, if there was one.
    """

    first: Failure | None = None
    failures: tuple[Failure, ...] = ()
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of the job."""
        if self.signal is not None:
            return 128 + self.signal
        return self.first.exit_code if self.first is not None else 0


@dataclass(frozen=True)
class _Exited:
    worker: Worker
    returncode: int


@dataclass(frozen=True)
class _Signalled:
    number: int
    forward: bool
    patience: float


_Event: TypeAlias = "_Exited | _Signalled | Failure"


class Supervisor:
    """Watches workers until all have ended. ``watch`` is called once, from one thread; the rest from anywhere."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._alive: dict[int, Worker] = {}
        self._failures: dict[int, Failure] = {}
        self._stopping = False
        self._signal: int | None = None

    def add(self, worker: Worker) -> None:
        """Watch one more worker. All are added before ``watch`` is called."""
        self._alive[worker.rank] = worker

    def fail(self, failure: Failure) -> None:
        """Tell of a failure in a process that is no worker: the launching process, when it is a rank itself."""
        self._events.put(failure)

    def interrupt(self, number: int, *, forward: bool, patience: float) -> None:
        """End the workers because of a signal. Safe to call from a signal handler; a second call kills.

        ``forward`` sends them the signal, which is not needed where the terminal has done that. They have
        ``patience`` seconds to end in their own way.
        """
        self._events.put(_Signalled(number, forward, patience))

    def watch(self) -> Outcome:
        """Block until all workers have ended, ending them if one fails. An exception raised in here ends them too."""
        for worker in self._alive.values():
            threading.Thread(target=self._wait_for, args=(worker,), name="fabric-wait", daemon=True).start()
        try:
            while self._alive and not self._failures:
                event = self._next(_HEARTBEAT)
                if event is not None:
                    self._handle(event)
                if self._signal is not None:
                    return self._outcome()
            if self._failures:
                self._drain(SETTLE)
        finally:
            self.stop()
        return self._outcome()

    def stop(self) -> None:
        """End all workers that are left: ask, wait ``GRACE`` seconds, kill. Those that failed are not asked again.

        Before that, those that write something in the background have ``SAVE_PATIENCE`` seconds to finish it.
        """
        self._stopping = True
        try:
            self._let_finish()
            self._look_at_reports()
            for worker in self._alive.values():
                if worker.rank not in self._failures:
                    worker.terminate()
            self._drain(GRACE)
        finally:  # also when a second Ctrl-C arrives in here
            self.kill()
        self._drain(_KILL_LIMIT)

    def _let_finish(self) -> None:
        deadline = time.monotonic() + SAVE_PATIENCE
        while any(is_busy(worker.report) for worker in self._alive.values()) and time.monotonic() < deadline:
            event = self._next(_LOOK_AGAIN)
            if event is not None:
                self._handle(event)

    def kill(self) -> None:
        """End all workers that are left, without asking or waiting."""
        for worker in self._alive.values():
            worker.kill()

    def _wait_for(self, worker: Worker) -> None:
        self._events.put(_Exited(worker, worker.wait()))

    def _next(self, timeout: float | None) -> _Event | None:
        with suppress(queue.Empty):
            return self._events.get(timeout=timeout)
        return None

    def _drain(self, seconds: float) -> None:
        """Handle events for so long, or until no worker is left."""
        deadline = time.monotonic() + seconds
        while self._alive and (event := self._next(max(0.0, deadline - time.monotonic()))) is not None:
            self._handle(event)

    def _handle(self, event: _Event) -> None:
        if isinstance(event, Failure):
            self._failures.setdefault(event.rank, event)
        elif isinstance(event, _Signalled):
            self._end_on_signal(event)
        else:
            self._note_exit(event.worker, event.returncode)

    def _note_exit(self, worker: Worker, returncode: int) -> None:
        self._alive.pop(worker.rank, None)
        self._look_at_reports(worker)
        if worker.rank in self._failures or returncode == 0:
            return
        crash = worker.crash.read_text(encoding="utf-8", errors="replace") if worker.crash.exists() else ""
        failure = from_exit_code(worker.rank, returncode, crash)
        if not (self._stopping and failure.exit_code in _ENDED_BY_US):
            self._failures[worker.rank] = failure

    def _look_at_reports(self, *ended: Worker) -> None:
        """Read the reports of failed workers, also of those that are still busy with their exit functions."""
        for worker in (*ended, *self._alive.values()):
            failure = Failure.read(worker.report)
            if failure is not None:
                self._failures.setdefault(worker.rank, failure)

    def _end_on_signal(self, event: _Signalled) -> None:
        if self._signal is not None:  # the second one: no more patience
            self.kill()
            return
        self._signal, self._stopping = event.number, True
        if event.forward:
            for worker in self._alive.values():
                worker.send(event.number)
        self._drain(event.patience)

    def _outcome(self) -> Outcome:
        return Outcome(first_of(self._failures.values()), tuple(self._failures.values()), self._signal)
