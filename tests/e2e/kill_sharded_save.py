"""Usage: kill_sharded_save.py FOLDER KILLS SEED. Prints what was found after each kill, as JSON.

Two processes overwrite a sharded checkpoint; one of them, or both, die by signal 9 at a random moment.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fabric_core.checkpoint.sharded.planning  # noqa: F401 - imported before the processes part
from fabric_core.checkpoint.sharded import open_sharded, ranks_of, verify, write_sharded

folder, kills, source = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
os.makedirs(folder)
path = os.path.join(folder, "ck")
torch.set_num_threads(1)
TIMEOUT = 20  # seconds; of the group. A survivor that takes longer has waited in vain
ROWS = 1024


def state(value):
    mesh = init_device_mesh("cpu", (2,))
    local = torch.full((ROWS // 2, 1024), value)  # one number all over: a mixture would show
    tensors = {f"layer{i}": DTensor.from_local(local, mesh, [Shard(0)], run_check=False) for i in range(4)}
    return {"model": tensors, "step": value}


def child(rank, store, ready, start, value):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    tensors = state(value)
    os.write(ready, b"r")
    os.read(start, 1)
    try:
        write_sharded(path, tensors, {"value": value}, ranks_of())
    except Exception:
        os._exit(1)
    os._exit(0)


def save(value, victims=(), moment=0.0):
    """Save in two processes, of which the victims are killed some seconds after the start; how long the rest lived."""
    (ready, say_ready), (start, say_start) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as place:
        children = []
        for rank in range(2):
            if (one := os.fork()) == 0:
                child(rank, os.path.join(place, "store"), say_ready, start, value)
            children.append(one)
        assert len(os.read(ready, 1) + os.read(ready, 1)) == 2
        begin = time.perf_counter()
        os.write(say_start, b"ss")
        if victims:
            time.sleep(moment)
        for rank in victims:
            os.kill(children[rank], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children]
    for pipe in (ready, say_ready, start, say_start):
        os.close(pipe)
    if not victims:
        assert codes == [0, 0], codes
    return time.perf_counter() - begin - (moment if victims else 0.0)


def found():
    try:
        problems = verify(path)
        with open_sharded(path) as checkpoint:
            tensors = {key: torch.empty(info.shape) for key, info in checkpoint.tensors.items()}
            checkpoint.read(tensors)
            values = {checkpoint.extras["value"], checkpoint.read_object("step")}
        for tensor in tensors.values():
            values.update(tensor.unique().tolist())
    except Exception as error:
        return f"lost: {error!r}"
    return "lost" if problems else {(1.0,): "old", (2.0,): "new"}.get(tuple(values), "mixed")


save(1.0)
seconds = save(1.0)
counts = {"old": 0, "new": 0, "leaked": 0, "leaked after the next save": 0, "slow survivors": 0}
for i in range(kills):
    victims = [(0,), (1,), (0, 1)][i % 3]
    earliest = (0.0, 0.8)[i % 2]  # every other time around the publication, which is short
    lived = save(2.0, victims, source.uniform(earliest, 1.1) * seconds)
    counts["slow survivors"] += lived > TIMEOUT
    state_found = found()
    counts[state_found] = counts.get(state_found, 0) + 1
    counts["leaked"] += len(os.listdir(folder)) - 1
    seconds = min(seconds, save(1.0))  # the quickest one so far: the machine may be busy
    counts["leaked after the next save"] += len(os.listdir(folder)) - 1
print(json.dumps(counts))
