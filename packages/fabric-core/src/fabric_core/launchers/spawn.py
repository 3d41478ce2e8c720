"""Starting the processes of a node from this one, and running a function in each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final

from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.abc.launcher import Launcher
from fabric_core.distributed.exit import leave_from_hook, open_files
from fabric_core.errors import InvalidArgumentError, UsageError, WorkerFailedError
from fabric_core.launchers.failure import render
from fabric_core.launchers.processes import Placement
from fabric_core.launchers.spawned import Package, Task, fail_unguarded, read_result, run_task
from fabric_core.launchers.state import GlobalState
from fabric_core.launchers.supervisor import INTERRUPT_PATIENCE, Supervisor, Worker
from fabric_core.launchers.terminal import typed_at_terminal

_GUARD: Final = """\
The program started processes while it was itself being loaded by one of them. Processes that are spawned import the \
main file first, so what starts them must run in the main process only:

    def main(fabric):
        ...

    if __name__ == "__main__":
        fabric = Fabric(devices=2, strategy="ddp_spawn")
        fabric.launch(main)
"""


class SpawnLauncher(Launcher):
    """Every rank is a process started with ``multiprocessing``; the calling process waits and is no rank.

    Args:
        environment: the address of rank 0, and which node this is.
        num_processes: processes on this node.
        num_nodes: nodes in all; on each of them the program is started by hand.
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        check_fork_safe: raises if this process can no longer be forked; an accelerator's ``check_fork_safe``.
    """

    requires_function: ClassVar[bool] = True

    def __init__(
        self,
        environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int = 1,
        start_method: str = "spawn",
        check_fork_safe: Callable[[], None] | None = None,
    ) -> None:
        offered = multiprocessing.get_all_start_methods()
        if start_method not in offered:
            raise InvalidArgumentError(
                f"start_method={start_method!r} does not exist on this system, which offers {', '.join(offered)}. "
                'Use Fabric(strategy="ddp") or "ddp_spawn".'
            )
        self.environment = environment
        self.num_processes = num_processes
        self.num_nodes = num_nodes
        self.start_method = start_method
        self.check_fork_safe = check_fork_safe
        self.pids: list[int] = []

    @property
    def is_interactive_compatible(self) -> bool:  # type: ignore[override]  # depends on the start method
        """Only forked processes know functions that were defined at a prompt."""
        return self.start_method == "fork"

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the function in ``num_processes`` new processes; return rank 0's result, its tensors on the CPU.

        After Ctrl-C the workers have a moment to end in their own way, then ``KeyboardInterrupt`` is raised here.

        Raises:
            WorkerFailedError: a process failed; the message holds the first failure's traceback, rank and host. If
                nobody catches it, this process ends with that worker's exit code.
            RuntimeError: the main file lacks an ``if __name__ == "__main__":`` guard.
        """
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            fail_unguarded(UsageError(_GUARD))
        if self.start_method == "fork" and self.check_fork_safe is not None:
            self.check_fork_safe()
        with tempfile.TemporaryDirectory(prefix="fabric-", ignore_cleanup_errors=True) as folder:
            self._run(Path(folder), Package(function, args, kwargs))
            return read_result(Path(folder))

    def _run(self, folder: Path, package: Package) -> None:
        supervisor = Supervisor()
        processes = self._start(folder, package, supervisor)
        self.pids = [process.pid or 0 for process in processes]
        try:
            with _interrupts_passed_on(supervisor):
                outcome = supervisor.watch()
        finally:
            for process in processes:
                process.join()
        if outcome.signal is not None:
            raise KeyboardInterrupt
        if outcome.first is not None:
            raise exiting_with_its_code(WorkerFailedError(render(outcome.first, outcome.failures), outcome.exit_code))

    def _start(self, folder: Path, package: Package, supervisor: Supervisor) -> list[BaseProcess]:
        context: Any = multiprocessing.get_context(self.start_method)
        forked = self.start_method == "fork"
        state = None if forked else GlobalState.capture()
        files = tuple(open_files()) if forked else ()
        started: list[BaseProcess] = []
        try:
            for local_rank in range(self.num_processes):
                task = self._task(folder, local_rank, state, files)
                process = context.Process(target=run_task, args=(task, package), name=f"fabric-rank-{task.place.rank}")
                with task.announced(), _fork_warning_off():
                    process.start()
                started.append(process)
                supervisor.add(_supervised(process, task))
        except BaseException:
            for process in started:
                process.kill()
                process.join()
            raise
        return started

    def _task(self, folder: Path, local_rank: int, state: GlobalState | None, files: tuple[Any, ...]) -> Task:
        place = Placement(
            local_rank=local_rank,
            local_world_size=self.num_processes,
            node_rank=self.environment.node_rank(),
            num_nodes=self.num_nodes,
            main_address=self.environment.main_address,
            main_port=self.environment.main_port,
        )
        # For the kernel it is the thread that starts a process whose end counts, and with a fork server neither is.
        by_signal = threading.current_thread() is threading.main_thread()
        parent = os.getpid() if self.start_method != "forkserver" else None
        return Task(place, str(folder), self.start_method, parent, by_signal, state, files)


def exiting_with_its_code(error: WorkerFailedError) -> WorkerFailedError:
    """The same error; should nobody catch it, this process ends with its exit code instead of 1.

    ``sys.excepthook`` is replaced for as long as the error exists, so no variable of a frame in its traceback may hold
    it.
    """
    previous = sys.excepthook
    code = error.exit_code
    mine = weakref.ref(error)

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        previous(kind, value, trace)
        if value is mine():
            leave_from_hook(code)
            raise SystemExit(code)  # from a hook, this becomes the exit of the process

    def restore() -> None:
        if sys.excepthook is hook:
            sys.excepthook = previous

    sys.excepthook = hook
    weakref.finalize(error, restore).atexit = False
    return error


def _supervised(process: BaseProcess, task: Task) -> Worker:
    def wait() -> int:
        process.join()
        for _ in range(20):  # someone else may have waited for it in the same moment, and not yet noted the code
            if process.exitcode is not None:
                return process.exitcode
            time.sleep(0.05)
        return 1

    def send(number: int) -> None:
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)

    return Worker(task.place.rank, wait, send, process.terminate, process.kill, task.report)


@contextmanager
def _interrupts_passed_on(supervisor: Supervisor) -> Iterator[None]:
    """While entered, a Ctrl-C reaches the workers instead of this process, unless the program has its own handler."""

    def handle(number: int, _: object) -> None:
        supervisor.interrupt(number, forward=not typed_at_terminal(), patience=INTERRUPT_PATIENCE)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _fork_warning_off() -> Iterator[None]:
    with warnings.catch_warnings():
        # Python warns of threads at every fork; whether forking is safe here is what check_fork_safe has answered.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield
