"""Starting the workers of a node as fresh interpreters that run a script or a module, under one supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric_core import settings
from fabric_core.launchers.parent_death import Lifeline
from fabric_core.launchers.supervisor import Supervisor, Worker
from fabric_core.settings import Setting


@dataclass(frozen=True)
class Placement:
    """Where one worker stands in the job, and where rank 0 is."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    main_address: str
    main_port: int

    @property
    def rank(self) -> int:
        """Rank among all processes; every node runs the same number of them."""
        return self.node_rank * self.local_world_size + self.local_rank

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return self.num_nodes * self.local_world_size

    def variables(self) -> dict[Setting, object]:
        """What the worker finds in its environment: the names that torch and torchrun use."""
        return {
            settings.MASTER_ADDR: self.main_address,
            settings.MASTER_PORT: self.main_port,
            settings.NODE_RANK: self.node_rank,
            settings.LOCAL_RANK: self.local_rank,
            settings.RANK: self.rank,
            settings.WORLD_SIZE: self.world_size,
            settings.LOCAL_WORLD_SIZE: self.local_world_size,
        }


class Crew:
    """The workers that this process started, and what they hold in common: a supervisor, a lifeline, a folder."""

    def __init__(self) -> None:
        self.supervisor = Supervisor()
        self._folder = Path(tempfile.mkdtemp(prefix="fabric-"))
        self._lifeline = Lifeline() if os.name == "posix" else None
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        """The process ids, in order of start."""
        return [process.pid for process in self._processes]

    def start(self, target: Sequence[str], placement: Placement, extra: Mapping[Setting, object]) -> None:
        """Start one worker that runs ``target``: ``[script, *arguments]`` or ``["-m", module, *arguments]``."""
        report = self._folder / f"rank-{placement.rank}.json"
        variables = {**placement.variables(), **extra, settings.WORKER: self._link(placement.rank, report)}
        inherited = (self._lifeline.worker_fd,) if self._lifeline is not None else ()
        process = subprocess.Popen(
            [*_interpreter(), "-m", "fabric_core.launchers.worker", *target],
            env=settings.child_environment(variables),
            pass_fds=inherited,
        )
        self._processes.append(process)
        self.supervisor.add(_supervised(process, placement.rank, report))

    def close(self) -> None:
        """Kill what is left and remove what the workers had in common."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        if self._lifeline is not None:
            self._lifeline.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _link(self, rank: int, report: Path) -> str:
        by_signal = threading.current_thread() is threading.main_thread()
        lifeline = self._lifeline.worker_fd if self._lifeline is not None else None
        link = {"parent": os.getpid(), "by_signal": by_signal, "fd": lifeline, "rank": rank, "report": str(report)}
        return json.dumps(link)


def _interpreter() -> list[str]:
    """This interpreter with the options it was given, such as ``-O`` and ``-W error``."""
    options: Any = getattr(subprocess, "_args_from_interpreter_flags", list)  # multiprocessing uses the same
    return [sys.executable, *options()]


def _supervised(process: subprocess.Popen[bytes], rank: int, report: Path) -> Worker:
    def wait() -> int:
        while process.returncode is None:
            with contextlib.suppress(InterruptedError):
                process.wait()
        return process.returncode

    return Worker(rank, wait, process.send_signal, process.terminate, process.kill, report)
