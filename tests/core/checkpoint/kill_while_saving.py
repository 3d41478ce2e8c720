"""Usage: kill_while_saving.py FOLDER KILLS nameless|named. Prints what was found after each kill, as JSON."""

import json
import os
import signal
import sys
import time

import torch

from fabric_core.checkpoint.commit import publish
from fabric_core.checkpoint.torch_io import TorchCheckpointIO

folder, kills, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.makedirs(folder)
path, io = os.path.join(folder, "state.ckpt"), TorchCheckpointIO()
torch.set_num_threads(1)


def save(value):
    state = {"w": torch.full((2**23,), value)}  # one number all over: a mixture would show
    if way == "nameless":
        io.save_checkpoint(state, path)
    else:
        with publish(path, anonymous=False) as file:
            torch.save(state, file)


def found():
    try:
        values = io.load_checkpoint(path)["w"].unique().tolist()
    except Exception:
        return "lost"
    return {(1.0,): "old", (2.0,): "new"}.get(tuple(values), "lost")


start = time.perf_counter()
save(1.0)
seconds = time.perf_counter() - start
counts = {"old": 0, "new": 0, "lost": 0, "leaked": 0, "leaked_after_next_save": 0}
for i in range(kills):
    if (child := os.fork()) == 0:
        save(2.0)
        os._exit(0)
    time.sleep(seconds * (i + 0.5) / kills)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    counts[found()] += 1
    counts["leaked"] += len(os.listdir(folder)) - 1
    save(1.0)
    counts["leaked_after_next_save"] += len(os.listdir(folder)) - 1
print(json.dumps(counts))
