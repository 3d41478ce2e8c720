"""The side of a spawned or forked worker: unpack the function, run it, leave the result or a report."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import MethodType
from typing import Any, Final, NoReturn

from fabric_core.distributed.background import announce_at
from fabric_core.distributed.exit import end_process, run_exit_functions
from fabric_core.errors import InvalidTypeError
from fabric_core.launchers.failure import from_exception
from fabric_core.launchers.parent_death import die_with_parent, watch_until
from fabric_core.launchers.processes import Placement
from fabric_core.launchers.state import GlobalState
from fabric_core.launchers.supervisor import CLEAN_UP_LIMIT
from fabric_core.launchers.worker import guard, record_crashes, settled, write_whole_lines
from fabric_core.settings import SPAWN_REPORT

_PICKLED: Final = "result.pickle"
_SAVED: Final = "result.pt"


class Package:
    """A function with its arguments, on its way to a worker.

    It is pickled apart from the rest and unpacked by the worker's own code, so that what cannot be unpickled there
    fails like everything else: with a report.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._content: Any = (function, args, kwargs)

    def __getstate__(self) -> bytes:
        # While a process is being started this pickler also takes locks, queues and connections.
        return bytes(ForkingPickler.dumps(self._content))

    def __setstate__(self, state: bytes) -> None:
        self._content = state

    def run(self) -> Any:
        """Call the function."""
        unpacked = self._content
        if isinstance(unpacked, bytes):
            unpacked = pickle.loads(unpacked)
            _unshare(unpacked)
        self._content = None
        function, args, kwargs = unpacked
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Task:
    """What a worker is told, beside the function.

    Attributes:
        place: its ranks.
        folder: where reports and the result go.
        start_method: how it was started.
        parent: the process to end with; ``None`` if this process is not started by that one directly.
        by_signal: whether the kernel may watch the parent.
        state: what to restore in a fresh interpreter.
        inherited: files of the parent that a forked process must not write out a second time.
    """

    place: Placement
    folder: str
    start_method: str
    parent: int | None
    by_signal: bool
    state: GlobalState | None
    inherited: tuple[Any, ...] = ()

    @property
    def report(self) -> Path:
        """Where a failure goes."""
        return Path(self.folder) / f"rank-{self.place.rank}.json"

    @contextmanager
    def announced(self) -> Iterator[None]:
        """While entered, a process that starts knows where to report a failure to load the main file."""
        SPAWN_REPORT.set(f"{self.place.rank}:{self.report}")
        try:
            yield
        finally:
            SPAWN_REPORT.unset()


def run_task(task: Task, package: Package) -> NoReturn:
    """Be a worker: tie this process to its parent, run the function, and end."""
    SPAWN_REPORT.unset()
    if task.parent is not None:
        die_with_parent(task.parent, task.by_signal)
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch_until(parent.join)
    record_crashes(task.report)
    announce_at(task.report)
    write_whole_lines()
    for setting, value in task.place.variables().items():
        setting.set(value)
    code = settled(guard(lambda: _work(task, package), task.place.rank, task.report))
    _run_exit_functions(task.start_method, code, task.inherited)
    end_process(code)


def fail_unguarded(error: Exception) -> NoReturn:
    """End a worker that is still loading the main file: with a report if it has been told where, so that the message
    is shown once and not by every worker; else by raising."""
    announced = SPAWN_REPORT.text()
    if announced is None:
        raise error
    rank, _, report = announced.partition(":")
    from_exception(int(rank), error).write(Path(report))
    end_process(1)


def read_result(folder: Path) -> Any:
    """What rank 0 returned, its tensors on the CPU."""
    if (folder / _SAVED).exists():
        import torch

        return torch.load(folder / _SAVED, map_location="cpu", weights_only=False)
    if (folder / _PICKLED).exists():
        return pickle.loads((folder / _PICKLED).read_bytes())
    return None


def _work(task: Task, package: Package) -> None:
    if task.state is not None:
        task.state.restore()
    result = package.run()
    if task.place.local_rank == 0 and result is not None:
        _write_result(result, Path(task.folder))


def _write_result(result: Any, folder: Path) -> None:
    """Through a file: it needs neither this process alive nor its file descriptors when it is read."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None:
            torch.save(result, folder / _SAVED)
        else:
            (folder / _PICKLED).write_bytes(pickle.dumps(result))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InvalidTypeError(
            f"The launched function returned a {type(result).__name__} that cannot be sent to the calling process: "
            f"{error}. Return plain values, containers and tensors."
        ) from error


def _unshare(content: Any) -> None:
    """Give modules memory of their own: on the way here their CPU tensors were put into memory that all workers share,
    and an in-place update by one would be seen by all."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for module in _modules_in(content, torch.nn.Module, set()):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == "cpu" and tensor.is_shared():
                tensor.data = tensor.data.clone()


def _modules_in(value: Any, kind: type[Any], seen: set[int]) -> Iterator[Any]:
    """The modules among arguments, also inside containers and in the object of a bound method."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _modules_in(item, kind, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _modules_in(item, kind, seen)
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, kind, seen)
        yield from _modules_in(getattr(value.__self__, "__dict__", None), kind, seen)


def _run_exit_functions(start_method: str, code: int, inherited: tuple[Any, ...]) -> None:
    """Those of this process: a forked one has also inherited its parent's, which are not to run here."""
    limit = CLEAN_UP_LIMIT if code else None
    if start_method == "fork":
        from multiprocessing import util

        end_children: Any = getattr(util, "_exit_function", None)
        run_exit_functions(limit, code, end_children or (lambda: None), inherited)
    else:
        run_exit_functions(limit, code)
