"""What a failed worker leaves behind, and which of several failures was the first.

A worker that fails writes a report into a file that its supervisor named. A file survives whatever happens to the
worker afterwards, needs no reader while the worker writes, and cannot be held open by grandchildren.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final

_SYMPTOM: Final = re.compile(
    r"connection (reset|closed|refused|was closed)|broken pipe|connectfullmesh failed|socket (closed|timeout)"
    r"|timed? ?out|remote process exited|not all ranks|unhandled system error",
    re.IGNORECASE,
)
_OWN_FILES: Final = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Failure:
    """One rank's failure.

    Attributes:
        rank: rank among all processes.
        host: name of the machine.
        when: seconds since the epoch at which the rank failed, or was found dead if it could not say.
        exit_code: what the process ends with; 128 + N when signal N ended it.
        summary: one line, the last of the traceback.
        text: everything there is to show.
    """

    rank: int
    host: str
    when: float
    exit_code: int
    summary: str
    text: str

    @property
    def is_symptom(self) -> bool:
        """Whether it looks like the consequence of another rank's end: a lost connection, a time-out."""
        return _SYMPTOM.search(self.summary) is not None

    def write(self, path: Path) -> None:
        """Leave the failure at ``path``, complete or not at all."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(draft, path)

    @staticmethod
    def read(path: Path) -> Failure | None:
        """The failure left at ``path``; ``None`` if there is none."""
        try:
            return Failure(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def from_exception(rank: int, error: BaseException) -> Failure:
    """The failure of a rank whose program raised ``error``, without the launcher's own frames."""
    if isinstance(error, SystemExit):
        return _from_system_exit(rank, error)
    shown = traceback.TracebackException(type(error), error, _user_part(error.__traceback__))
    summary = "".join(shown.format_exception_only()).strip().splitlines()[-1:] or [type(error).__name__]
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    return Failure(rank, socket.gethostname(), time.time(), code, summary[0], "".join(shown.format()).rstrip())


def from_exit_code(rank: int, returncode: int, crash: str = "") -> Failure:
    """The failure of a rank that ended without a word. ``returncode`` is negative for a signal, as in subprocess."""
    if returncode < 0:
        summary, code = f"ended by {signal_name(-returncode)}", 128 - returncode
    else:
        summary, code = f"ended with exit code {returncode}", returncode
    text = f"{crash.rstrip()}\n{summary}" if crash.strip() else summary
    return Failure(rank, socket.gethostname(), time.time(), code, summary, text)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 40`` where there is no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_code_of(error: SystemExit) -> int:
    """The exit code that Python gives a process for ``sys.exit(...)``."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def first_of(failures: Iterable[Failure]) -> Failure | None:
    """The failure that came first; symptoms of another rank's end only count where there is nothing else."""
    return min(failures, key=lambda failure: (failure.is_symptom, failure.when), default=None)


def headline(first: Failure) -> str:
    """The line that says which rank failed first, where, and with what exit code."""
    return f"Rank {first.rank} on {first.host} failed first, exit code {first.exit_code}:"


def render(first: Failure, others: Iterable[Failure] = ()) -> str:
    """The text for the user: the first failure in full, all others in one line."""
    lines = [headline(first), first.text]
    later = sorted((other for other in others if other.rank != first.rank), key=lambda other: other.rank)
    if later:
        ranks = ", ".join(str(other.rank) for other in later)
        lines += [f"Afterwards rank {ranks} failed too: {later[0].summary[:200]}"]
    return "\n".join(lines)


def _user_part(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that belongs to the program."""
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith((_OWN_FILES, "<frozen runpy>")):
        rest = rest.tb_next
    return rest or trace


def _from_system_exit(rank: int, error: SystemExit) -> Failure:
    code = exit_code_of(error)
    summary = f"sys.exit({error.code!r})" if isinstance(error.code, int) else f"SystemExit: {error.code}"
    frames = traceback.extract_tb(_user_part(error.__traceback__))
    where = f'  File "{frames[-1].filename}", line {frames[-1].lineno}, in {frames[-1].name}\n' if frames else ""
    return replace(from_exit_code(rank, code), summary=summary, text=where + summary)
