"""Usage: peak_memory_sharded.py FOLDER. Prints peak memory above the live state, over the live state, as JSON."""

import json
import sys
from pathlib import Path

import torch

from fabric_core.checkpoint.sharded import open_sharded, ranks_of, write_sharded


def memory(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_over_live(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / live


def read(wanted):
    with open_sharded(path) as checkpoint:
        checkpoint.read(wanted)


path = sys.argv[1]
write_sharded(path, {"model": {"small": torch.ones(3)}}, {}, ranks_of())  # what both import on first use
read({"model.small": torch.empty(3)})

memories = [torch.full((1001, 4096), float(i)) for i in range(16)]
live = sum(tensor.nbytes for tensor in memories)
state = {str(i): tensor[:1000] for i, tensor in enumerate(memories)}  # as shards, which do not fill their memory
saving = peak_over_live(lambda: write_sharded(path, {"model": state}, {}, ranks_of()))
whole = {f"model.{key}": tensor for key, tensor in state.items()}
loading = peak_over_live(lambda: read(whole))
converting = peak_over_live(lambda: read({"model.0": whole["model.0"].view(torch.bfloat16)[:, ::2]}))
print(json.dumps({"save": saving, "load": loading, "convert": converting}))
