"""Usage: peak_memory.py FILE. Prints peak memory above the live state, over the live state, of a save and a load."""

import json
import sys
from pathlib import Path

import torch

from fabric_core.checkpoint.restore import restore
from fabric_core.checkpoint.state import collect_state
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.write import write_checkpoint


def memory(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_over_live(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / live


io, path = TorchCheckpointIO(), sys.argv[1]
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(1, 1024)).sum().backward()
optimizer.step()
state = {"model": model, "optimizer": optimizer}
live = sum(p.nbytes for p in model.parameters()) * 3
write_checkpoint(io, path, collect_state({"model": torch.nn.Linear(1, 1)}))  # what both import on first use
restore(io, path, {"model": torch.nn.Linear(1, 1)})
saving = peak_over_live(lambda: write_checkpoint(io, path, collect_state(state)))
loading = peak_over_live(lambda: restore(io, path, state))
print(json.dumps({"save": saving, "load": loading}))
