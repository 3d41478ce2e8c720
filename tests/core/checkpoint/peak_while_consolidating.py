"""Usage: peak_while_consolidating.py FOLDER. Prints the peak memory above what was used before, in bytes."""

import sys
import tempfile
from pathlib import Path

import torch

from fabric_core.checkpoint.conversion.consolidate import consolidate
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.write import write_sharded


def memory(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


with tempfile.TemporaryDirectory() as folder:  # what is imported on first use
    write_sharded(f"{folder}/x", {"w": torch.ones(1)}, {}, ranks_of(None))
    consolidate(f"{folder}/x")
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
consolidate(sys.argv[1])
print(memory("VmHWM") - before)
