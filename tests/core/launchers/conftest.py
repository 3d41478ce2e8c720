"""Programs that a test writes, runs as real processes, and looks at from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

LIMIT = 40.0
# What would make a program a worker of some other job, and what would let two programs' lines mix.
DROPPED = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "NODE_RANK",
    "GROUP_",
    "LT_",
    "TORCHELASTIC",
    "FABRIC_",
    "PYTHONUN",
)


@dataclass
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str


def _heed_ctrl_c() -> None:
    """Whoever starts the tests in the background has them ignore it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Programs:
    """Writes programs into one folder and runs them there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[str]] = []

    def write(self, text: str, name: str = "program.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return path

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start ``python *words``."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=self.folder,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_ctrl_c,
        )
        self._running.append(process)
        return process

    def run(self, *words: object) -> Ended:
        """Run ``python *words`` to its end."""
        return self.end(self.start(*words))

    def fabric_run(self, *words: object) -> Ended:
        """Run ``fabric run *words`` to its end."""
        return self.run("-m", "fabric_core", "run", *words)

    def end(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=LIMIT)
        return Ended(process.returncode, out, err)

    def seconds_since(self, name: str) -> float:
        """How long ago a program wrote the time into the file ``name``."""
        return time.time() - float((self.folder / name).read_text())

    def wait_for_pids(self, count: int) -> list[int]:
        """The process ids that workers left as ``pid-*`` files, once there are so many."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            names = [path.name.partition("-")[2] for path in self.folder.glob("pid-*")]
            if len(names) == count:
                return [int(name) for name in names]
            time.sleep(0.02)
        raise TimeoutError(f"{count} workers were expected, {len(names)} are there")

    def kill_all(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate(timeout=LIMIT)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int], seconds: float) -> bool:
    """Whether all processes have ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_alive, pids))


@pytest.fixture
def programs(tmp_path):
    """A folder for programs; whatever still runs at the end of the test is killed."""
    made = Programs(tmp_path)
    yield made
    made.kill_all()


@pytest.fixture
def gone():
    """The function ``gone(pids, seconds)``."""
    return all_gone
