"""What every worker that is started as a fresh interpreter runs through.

``python -m fabric_core.launchers.worker SCRIPT ARGS...`` behaves like ``python SCRIPT ARGS...``, and with ``-m MODULE``
like ``python -m MODULE``. In addition the worker does not outlive its launcher, leaves a report where it fails, and
ends without the abort that finalising can bring on. It imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import io
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

from fabric_core.distributed.background import announce_at, finish_background_work, finish_or_tell
from fabric_core.distributed.exit import end_process, run_exit_functions
from fabric_core.launchers.failure import exit_code_of, from_exception
from fabric_core.launchers.parent_death import die_with_parent, watch_lifeline, watch_process
from fabric_core.launchers.supervisor import CLEAN_UP_LIMIT, SAVE_PATIENCE
from fabric_core.settings import WORKER


@dataclass(frozen=True)
class Link:
    """A worker's side of the connection to its supervisor."""

    parent: int
    by_signal: bool
    fd: int | None
    rank: int
    report: str

    @staticmethod
    def from_environment() -> Link | None:
        """The link that the launcher left in the environment, taken out so that no grandchild inherits it."""
        text = WORKER.text()
        WORKER.unset()
        return Link(**json.loads(text)) if text else None

    def attach(self) -> None:
        """Tie this process's life to its parent's."""
        die_with_parent(self.parent, self.by_signal)
        if self.fd is not None:
            os.set_inheritable(self.fd, False)
            watch_lifeline(self.fd)
        else:
            watch_process(self.parent)


def guard(body: Callable[[], object], rank: int, report: Path) -> int:
    """Run ``body`` and return the exit code for this process; a failure leaves a report instead of a traceback.

    What ``body`` left to the background is waited for, and fails with it.
    """
    try:
        _run_to_the_end(body)
    except KeyboardInterrupt:
        _ignore_interrupts()
        return 130
    except SystemExit as error:
        code = exit_code_of(error)
        if code:
            from_exception(rank, error).write(report)
        return code
    except BaseException as error:
        from_exception(rank, error).write(report)
        _call_excepthook(error)
        return 1
    return 0


def _run_to_the_end(body: Callable[[], object]) -> None:
    try:
        body()
    except SystemExit as error:
        if exit_code_of(error):
            raise
    finish_background_work()


def settled(code: int) -> int:
    """The exit code, once nothing goes on in the background: after a failure that is waited for, but not for ever."""
    well = finish_or_tell(SAVE_PATIENCE if code else None)
    return code if well else code or 1


def record_crashes(report: Path) -> None:
    """Have the interpreter write the Python traceback of a crash in native code beside the report."""
    if not faulthandler.is_enabled():
        faulthandler.enable(os.open(report.with_suffix(".crash"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))


def write_whole_lines() -> None:
    """Have output leave with every line: a worker may be killed, and the lines of several shall not mix."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def _call_excepthook(error: BaseException) -> None:
    """Let a program's own ``sys.excepthook`` know, as experiment trackers want; what it prints, the report has."""
    if sys.excepthook is not sys.__excepthook__:
        with contextlib.suppress(BaseException), contextlib.redirect_stderr(io.StringIO()):
            sys.excepthook(type(error), error, error.__traceback__)


def _ignore_interrupts() -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(target: list[str]) -> None:
    """Run ``[script, *arguments]`` or ``["-m", module, *arguments]`` as ``__main__``."""
    if target[0] == "-m":
        sys.argv[:] = target[1:]
        code, names = _find_module(target[1])
        sys.argv[0] = names["__file__"]
    else:
        sys.argv[:] = target
        _replace_first_path(str(Path(target[0]).resolve().parent))
        if Path(target[0]).is_dir() or not target[0].endswith((".py", ".pyw")):
            runpy.run_path(target[0], run_name="__main__")  # folders, archives, compiled files
            return
        code, names = _read_script(target[0])
    # Not through runpy: it takes its module away again when the code ends, while exit functions still pickle from it.
    module = ModuleType("__main__")
    module.__dict__.update(names, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _read_script(script: str) -> tuple[CodeType, dict[str, Any]]:
    path = os.path.abspath(script)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    return code, {"__file__": path, "__spec__": None, "__package__": None, "__loader__": None, "__cached__": None}


def _find_module(name: str) -> tuple[CodeType, dict[str, Any]]:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    loader: Any = spec.loader if spec is not None else None
    code = loader.get_code(spec.name) if spec is not None and loader is not None else None
    if spec is None or code is None:
        raise ModuleNotFoundError(f"fabric run -m {name}: there is no such module, or it cannot be run.", name=name)
    names = {"__file__": spec.origin, "__spec__": spec, "__package__": spec.parent, "__loader__": loader}
    return code, {**names, "__cached__": spec.cached}


def _replace_first_path(folder: str) -> None:
    """``python -m`` put the working folder first; a script's own folder belongs there."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def main() -> NoReturn:
    """Run the program that the command line names, and end this process."""
    link = Link.from_environment()
    if link is None:
        sys.stderr.write("fabric_core.launchers.worker is started by a launcher: type `fabric run SCRIPT`.\n")
        sys.exit(2)
    link.attach()
    report = Path(link.report)
    record_crashes(report)
    announce_at(report)
    write_whole_lines()
    target = sys.argv[1:]
    finish(guard(lambda: _run(target), link.rank, report))


def finish(code: int) -> NoReturn:
    """Do what the interpreter does at its end, within a limit after a failure, and end this process."""
    code = settled(code)
    run_exit_functions(CLEAN_UP_LIMIT if code else None, code)
    end_process(code)


if __name__ == "__main__":
    main()
