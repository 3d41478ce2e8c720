"""CPU and wall time of commands that should be instant: the least of several runs, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

COMMANDS = (["--help"], ["plugins", "list"], ["plugins", "show", "ddp"])


def run(words: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of one run."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "fabric_core", *words], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, wall


if __name__ == "__main__":
    for words in COMMANDS:
        cpu, wall = map(min, zip(*(run(words) for _ in range(9)), strict=True))
        print(f"fabric {' '.join(words):20s} {cpu * 1e3:4.0f} ms CPU, {wall * 1e3:4.0f} ms")
