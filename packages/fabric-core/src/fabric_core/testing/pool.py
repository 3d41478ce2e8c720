"""A pool of real processes joined by gloo, started once and used by many tests."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from fabric_core import settings
from fabric_core.distributed.background import finish_background_work
from fabric_core.distributed.exit import end_process
from fabric_core.distributed.port import ReservedPort, reserve_port
from fabric_core.errors import WorkerFailedError


class WorkerPool:
    """``world_size`` processes that have joined one process group and run functions on demand.

    In each, the variables that ``torchrun`` would set are set, so that ``Fabric(devices=world_size, strategy="ddp")``
    finds its processes started. After a failure or a time-out the processes are ended, and started anew for the next
    call. Start-up costs seconds; a call costs milliseconds.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._port: ReservedPort | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """The results of ``function(*args)`` by rank.

        Args:
            function: defined at the top level of a file; found there by its name.
            *args: must be picklable; so must the results.
            timeout: seconds until the call counts as failed.

        Raises:
            WorkerFailedError: a rank failed, died or did not answer in time; holds the first failure's traceback.
        """
        if not self._processes:
            self._start()
        task = pickle.dumps((function.__code__.co_filename, function.__qualname__, args))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        try:
            return self._collect(time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = self._port = reserve_port()
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port.port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.world_size) if rank not in results]
                raise WorkerFailedError(f"Ranks {missing} of {self.world_size} did not answer in time.")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Any:
        try:
            failed, value = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            raise WorkerFailedError(f"Rank {rank} on {socket.gethostname()} died with exit code {code}.") from None
        if failed:
            raise WorkerFailedError(f"Rank {rank} on {socket.gethostname()} failed:\n{value}")
        return value

    def stop(self) -> None:
        """End the processes; no error if there are none."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._port is not None:
            self._port.close()
        self._processes, self._pipes, self._port = [], [], None


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """The life of a worker: join the group, then run what comes through the pipe until it closes."""
    import torch
    import torch.distributed as dist

    from fabric_core.testing.isolation import preserved

    torch.set_num_threads(1)
    for setting, value in {
        settings.RANK: rank,
        settings.LOCAL_RANK: rank,
        settings.GROUP_RANK: 0,
        settings.WORLD_SIZE: world_size,
        settings.LOCAL_WORLD_SIZE: world_size,
        settings.MASTER_ADDR: "127.0.0.1",
        settings.MASTER_PORT: port,
        settings.TORCHELASTIC_RUN_ID: "worker-pool",
        settings.OMP_NUM_THREADS: 1,
    }.items():
        setting.set(value)
    dist.init_process_group("gloo")
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            path, name, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            end_process(0)
        try:
            with preserved():
                result = getattr(_module_at(path, modules), name)(*args)
                finish_background_work()
                answer = pickle.dumps((False, result))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)


def _module_at(path: str, modules: dict[str, ModuleType]) -> ModuleType:
    """The file as a module, imported once per worker; its folder is importable as in a script."""
    if path not in modules:
        sys.path.insert(0, os.path.dirname(path))
        name = f"_pool_{Path(path).stem}_{len(modules)}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        modules[path] = module
    return modules[path]
