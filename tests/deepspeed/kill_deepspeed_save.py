"""Usage: kill_deepspeed_save.py FOLDER KILLS SEED. Prints what was found after each kill, as JSON.

Two processes overwrite a checkpoint in DeepSpeed's layout; one of them, or both, die by signal 9 at a random moment.
"""

import json
import os
import random
import signal
import struct
import sys
import time
from datetime import timedelta

import torch

sys.path.insert(0, os.path.dirname(__file__))
import fabric_deepspeed.checkpoint.mixin  # noqa: F401 - imported before the processes part
from fabric_core import Fabric
from fabric_core.distributed.port import reserve_port
from fabric_deepspeed import DeepSpeedStrategy
from fabric_deepspeed.backend import load
from fabric_deepspeed.checkpoint.live import shape_of
from fabric_deepspeed.checkpoint.saved import SavedEngine

folder, kills, source = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
os.makedirs(folder)
path = os.path.join(folder, "ck")
torch.set_num_threads(1)
load("cpu")
TIMEOUT = 30  # seconds; of the group. A survivor that takes longer has waited in vain


def child(rank, port, ready, start, stage):
    """Save ones in peace; then twos, which is when somebody dies."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kill"}
    os.environ.update({name: str(place) for name, place in places.items()})
    strategy = DeepSpeedStrategy(stage=stage, timeout=timedelta(seconds=TIMEOUT))
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    module = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters()))
    for value in (1.0, 2.0):
        weights = {name: torch.full(shape_of(p), value) for name, p in module.named_parameters()}
        strategy.load_module_state_dict(module, weights)  # one number all over: a mixture would show
        begin = time.perf_counter()
        try:
            fabric.save(path, {"model": model, "optimizer": optimizer, "value": value})
        except Exception:
            os._exit(1)
        if value == 1.0:
            os.write(ready, struct.pack("d", time.perf_counter() - begin))
            os.read(start, 1)
    os._exit(0)


def killed_save(stage, victims, part):
    """How many things the save of ones has left beside it, and how long the survivors of that of twos lived.

    The victims are killed when ``part`` of the time that a save takes has passed.
    """
    (ready, say_ready), (start, say_start) = os.pipe(), os.pipe()
    port = reserve_port()
    children = []
    for rank in range(2):
        if (one := os.fork()) == 0:
            child(rank, port.port, say_ready, start, stage)
        children.append(one)
    os.close(say_ready)
    told = b""
    while len(told) < 16:
        told += os.read(ready, 16) or sys.exit("a save without kills failed")
    left = len(os.listdir(folder)) - 1
    os.write(say_start, b"ss")
    time.sleep(part * max(struct.unpack("2d", told)))
    for rank in victims:
        os.kill(children[rank], signal.SIGKILL)
    begin = time.perf_counter()
    for one in children:
        os.waitpid(one, 0)
    port.close()
    for pipe in (ready, start, say_start):
        os.close(pipe)
    return left, time.perf_counter() - begin


def found():
    try:
        content = SavedEngine(path, None).content()
        values = {content["value"]}
        for stream in content["model"].values():
            for piece in stream.pieces():
                values.update(piece.unique().tolist())
    except Exception as error:
        return f"lost: {error!r}"
    return {(1.0,): "old", (2.0,): "new"}.get(tuple(values), f"mixed: {values}")


counts = {"old": 0, "new": 0, "left behind": 0, "left behind after the next save": 0, "slow survivors": 0}
for i in range(kills):
    earliest = (0.0, 0.6)[i % 2]  # every other time around the publication, which is short
    left, lived = killed_save(2 + i % 2, [(0,), (1,), (0, 1)][i % 3], source.uniform(earliest, 1.1))
    counts["left behind after the next save"] += left
    counts["slow survivors"] += lived > TIMEOUT
    state_found = found()
    counts[state_found] = counts.get(state_found, 0) + 1
    counts["left behind"] += len(os.listdir(folder)) - 1
print(json.dumps(counts))
