"""How soon `fabric run` ends after one of its processes has failed: seconds from the failure to the end, and the code.

Every other process sleeps and ignores the request to end, so the figure includes the patience that they get.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAILURES = {
    "raises": "raise ValueError('on purpose')",
    "exits with 3": "sys.exit(3)",
    "is killed": "os.kill(os.getpid(), 9)",
}
PROCESSES, ROUNDS = 4, 5
PROGRAM = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "1":
    time.sleep(0.5)
    pathlib.Path("failed").write_text(str(time.time()))
    {statement}
time.sleep(60)
"""


def end(folder: Path, statement: str) -> tuple[float, int]:
    """Seconds from the failure to the end of the job, and its exit code."""
    (folder / "program.py").write_text(PROGRAM.format(statement=statement))
    command = [sys.executable, "-m", "fabric_core", "run", "--devices", str(PROCESSES), "program.py"]
    code = subprocess.run(command, cwd=folder, check=False, stderr=subprocess.DEVNULL).returncode
    return time.time() - float((folder / "failed").read_text()), code


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for words, statement in FAILURES.items():
            ended = [end(Path(name), statement) for _ in range(ROUNDS)]
            codes = sorted({code for _, code in ended})
            print(
                f"rank 1 of {PROCESSES} {words:12s} {max(ended)[0]:.2f} s at most in {ROUNDS} runs, exit code {codes}"
            )
