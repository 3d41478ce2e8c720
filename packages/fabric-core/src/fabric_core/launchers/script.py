"""Running the user's script again, once for every further process of this node."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, NoReturn

from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.abc.launcher import Launcher
from fabric_core.distributed.background import finish_or_tell
from fabric_core.distributed.exit import end_process, flush_within, leave_cleanly, run_exit_functions
from fabric_core.errors import UsageError
from fabric_core.launchers.failure import exit_code_of, from_exception, headline, render
from fabric_core.launchers.processes import Crew, Placement
from fabric_core.launchers.supervisor import CLEAN_UP_LIMIT, INTERRUPT_PATIENCE, SAVE_PATIENCE, Outcome

_EXCEPTION_LIMIT: Final = 0.15
"""Seconds that the main thread has to come up with its own error after another rank failed."""
_VERDICT_LIMIT: Final = 8.0
_FLUSH_LIMIT: Final = 0.2


class ScriptLauncher(Launcher):
    """The calling process is local rank 0; ``launch`` starts the others by running the same script again.

    If one process fails, the others end within a second, rank 0 included, with the first failure's exit code.

    In each process ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ... tell its place, to the end of the process: the others
    live as long, and a further launch finds them there. One process alone has no place, and no variable is set.

    Args:
        environment: the address of rank 0, and which node this is.
        num_processes: processes on this node.
        num_nodes: nodes in all; on each of them the script is started by hand.
    """

    requires_function: ClassVar[bool] = False
    is_interactive_compatible: ClassVar[bool] = False

    def __init__(self, environment: ClusterEnvironment, num_processes: int, num_nodes: int = 1) -> None:
        self.environment = environment
        self.num_processes = num_processes
        self.num_nodes = num_nodes
        self.pids: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pids": []}

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start the other processes, unless they exist already; run the function here and return its result.

        Raises:
            RuntimeError: there is no script that could be run again, as at a prompt or with ``python -c``.
        """
        # Asked here again: since this object was made, another Fabric object of the program may have started them.
        if self.num_processes * self.num_nodes > 1 and not self.environment.creates_processes_externally:
            self._start_others()
        return function(*args, **kwargs)

    def _start_others(self) -> None:
        if self.environment.local_rank() != 0:
            raise UsageError(
                f"launch() was called in local rank {self.environment.local_rank()}, but only local rank 0 starts the "
                "other processes. Unset LOCAL_RANK, or start every process in the same way."
            )
        places = [
            Placement(
                local_rank=local_rank,
                local_world_size=self.num_processes,
                node_rank=self.environment.node_rank(),
                num_nodes=self.num_nodes,
                main_address=self.environment.main_address,
                main_port=self.environment.main_port,
            )
            for local_rank in range(self.num_processes)
        ]
        if self.num_processes > 1:
            target = rerun_target()
            crew = Crew()
            try:
                for place in places[1:]:
                    crew.start(target, place, {})
            except BaseException:
                crew.close()
                raise
            self.pids = crew.pids
            _RankZero(crew, places[0].rank).protect()
        for setting, value in places[0].variables().items():
            setting.set(value)


def rerun_target() -> list[str]:
    """What to hand to an interpreter to run this program again, with its arguments."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    script = getattr(main, "__file__", None) or (sys.argv[0] if spec is not None else None)
    if script is None or not Path(script).exists():
        raise UsageError(
            "There is no script that the other processes could run: this is a prompt, a notebook or `python -c`. "
            'Put the program into a file, or use Fabric(strategy="ddp_fork") or "ddp_spawn".'
        )
    if spec is not None:  # a folder or an archive with a __main__ module in it
        script = sys.argv[0]
    return [os.path.abspath(script), *sys.argv[1:]]


class _RankZero:
    """Ties the fate of this process, which is a rank itself, to that of the workers it started."""

    def __init__(self, crew: Crew, rank: int) -> None:
        self._crew = crew
        self._rank = rank
        self._pid = os.getpid()
        self._outcome: Outcome | None = None
        self._left: float | None = None  # when this rank came to its end
        self._own_code = 0  # what it then gave to sys.exit()
        self._exit = sys.exit
        self._recorder: Callable[..., NoReturn] | None = None
        self._watched = threading.Event()
        self._ending = threading.Lock()
        self._previous_hook = sys.excepthook
        self._stderr = sys.stderr  # torch wraps the hook and holds back what is written while it runs
        self._thread = threading.Thread(target=self._watch, name="fabric-supervisor", daemon=True)

    def protect(self) -> None:
        """From now on a failed worker ends this process, and a failure here ends the workers."""
        sys.excepthook = self._hook
        sys.exit = self._recorder = self._recording_exit()
        atexit.register(self._on_exit)
        self._thread.start()

    def _watch(self) -> None:
        """The supervisor's thread: wait for the workers' end, and end this process if one of them failed."""
        try:
            outcome = self._outcome = self._crew.supervisor.watch()
        finally:
            self._crew.close()
            self._watched.set()
        if self._is_consequence(outcome):  # the interpreter is about to end with this rank's own exit code
            self._tell_consequence(outcome)
            self._restore_hook()
        elif self._is_foreign(outcome):
            # The main thread usually finds out by itself, from a lost connection, and then ends in a better way.
            # After Ctrl-C, which reached it too, it may be saving its work.
            time.sleep(INTERRUPT_PATIENCE if outcome.exit_code == 130 else _EXCEPTION_LIMIT)
            self._end(outcome)
        else:
            self._restore_hook()

    def _is_foreign(self, outcome: Outcome) -> bool:
        return outcome.first is not None and outcome.first.rank != self._rank

    def _is_consequence(self, outcome: Outcome) -> bool:
        """Whether this rank failed by ``sys.exit()``, and others only because they still talked to it."""
        first, left = outcome.first, self._left
        if first is None or left is None or not self._own_code or not self._is_foreign(outcome):
            return False
        return first.is_symptom and first.when >= left

    def _tell_consequence(self, outcome: Outcome) -> None:
        ranks = ", ".join(str(failure.rank) for failure in outcome.failures)
        with contextlib.suppress(Exception):
            self._stderr.write(
                f"Rank {self._rank} ended itself with exit code {self._own_code}. Afterwards rank {ranks} failed too: "
                f"{outcome.failures[0].summary[:200]}\n"
            )
            self._stderr.flush()

    def _end(self, outcome: Outcome) -> None:
        """End this process without the main thread, which may be stuck in native code. The first caller prevails."""
        if self._ending.acquire(blocking=False):
            self._tell(outcome)
            finish_or_tell(SAVE_PATIENCE)
            flush_within(_FLUSH_LIMIT)
            end_process(outcome.exit_code)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.first is not None:
            with contextlib.suppress(Exception):
                self._stderr.write(render(outcome.first, outcome.failures) + "\n")
                self._stderr.flush()

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """In the main thread: take the workers down with this rank; show their failure instead, if theirs was first."""
        if os.getpid() != self._pid:  # a forked child has inherited the hook, but no worker
            self._previous_hook(kind, error, trace)
            return
        failure = from_exception(self._rank, error)
        finish_or_tell(SAVE_PATIENCE)  # while the others, who may take part in the writing, are still there
        self._crew.supervisor.fail(failure)
        self._watched.wait(_VERDICT_LIMIT)
        outcome = self._outcome
        if outcome is not None and self._is_foreign(outcome) and not isinstance(error, KeyboardInterrupt):
            if self._ending.acquire(blocking=False):
                self._tell(outcome)
                # Finalising an interpreter with torch in it takes up to a second, which a failed job does not have.
                run_exit_functions(CLEAN_UP_LIMIT, outcome.exit_code)
                end_process(outcome.exit_code)
            time.sleep(_VERDICT_LIMIT)  # the thread was faster and is ending this process
        self._restore_hook()
        if not isinstance(error, KeyboardInterrupt):
            sys.stderr.write(headline(failure) + "\n")
        self._previous_hook(kind, error, trace)

    def _restore_hook(self) -> None:
        if sys.excepthook == self._hook:  # someone else's hook on top calls this one, and this one goes on as before
            sys.excepthook = self._previous_hook
        if sys.exit is self._recorder:
            sys.exit = self._exit

    def _recording_exit(self) -> Callable[..., NoReturn]:
        """``sys.exit`` that remembers the exit code: Python hides it from the functions that it runs at the end."""

        @functools.wraps(self._exit)
        def exit_(status: Any = None, /) -> NoReturn:
            if threading.current_thread() is threading.main_thread():
                self._own_code = exit_code_of(SystemExit(status))
            self._exit(status)

        return exit_

    def _on_exit(self) -> None:
        """This rank has come to its end; wait for the others, which may still be at work."""
        if os.getpid() != self._pid:
            return
        if self._watched.is_set() and (self._outcome is None or not self._is_foreign(self._outcome)):
            return
        self._left = time.time()
        leave_cleanly()  # or a worker would wait in a collective for a rank that has left
        self._thread.join()
