"""Saving in the background from several processes: who waits for whom, and who learns of a failure."""

import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

from fabric_core import Fabric
from fabric_core.checkpoint.async_io import AsyncCheckpointIO, background_group
from fabric_core.checkpoint.sharded import ranks_of
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.testing import WorkerPool


class Slow(TorchCheckpointIO):
    """Takes a moment, and fails to write what is called so."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        time.sleep(0.3)
        if "bad" in str(path):
            raise OSError(28, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


def launched(io=None):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", checkpoint_io=io or AsyncCheckpointIO(Slow()))
    fabric.launch()
    return fabric


def outcome(action):
    try:
        return action()
    except Exception as error:
        return type(error).__name__, str(error)


def save_and_load(folder):
    fabric, found = launched(), []
    for step in range(3):
        weight = torch.full((2**16,), step)
        fabric.save(f"{folder}/a.ckpt", {"weight": weight})
        weight.fill_(-1)
        found.append(fabric.load(f"{folder}/a.ckpt")["weight"].unique().tolist())
    return found


def test_every_rank_loads_what_rank_zero_was_still_writing(workers, tmp_path):
    assert workers(2).run(save_and_load, str(tmp_path)) == [[[0], [1], [2]]] * 2


def fail(folder):
    fabric = launched()
    calls = {
        "fabric.save": lambda: fabric.save(f"{folder}/good.ckpt", {"step": 1}),
        "fabric.load": lambda: fabric.load(f"{folder}/old.ckpt"),
        "fabric.teardown": fabric.teardown,
    }
    outcomes = {}
    for name, call in calls.items():
        fabric.save(f"{folder}/bad.ckpt", {"step": 1})
        outcomes[name] = outcome(call)
    fabric.launch()
    outcomes["afterwards"] = outcome(lambda: fabric.save(f"{folder}/good.ckpt", {"step": 2}))
    return outcomes


def test_a_failure_of_rank_zero_is_raised_on_all_ranks(workers, tmp_path):
    torch.save({"step": 0}, tmp_path / "old.ckpt")
    zero, one = workers(2).run(fail, str(tmp_path))
    assert zero.pop("afterwards") is one.pop("afterwards") is None
    for name, (kind, message) in one.items():
        assert (kind, name in message) == ("CheckpointError", True)
        assert "failed on another rank" in message
    assert {kind for kind, _ in zero.values()} == {"OSError"}
    assert torch.load(tmp_path / "good.ckpt", weights_only=True) == {"step": 2}


def write_together(folder):
    """What a sharded checkpoint does: collectives in the background, while the main group is in use."""
    fabric = launched("async")
    io, group = fabric.strategy.checkpoint_io, background_group()
    sums = []
    for step in range(3):
        part = io.stage(torch.tensor(float(step + fabric.global_rank)))

        def write(part=part):
            time.sleep(0.1)
            dist.all_reduce(part, group=group)

        io.submit(write, folder)
        for _ in range(20):
            fabric.all_reduce(torch.ones(4))
        io.drain()
        sums.append(part.item())
    return sums, group is background_group(), dist.get_backend(group), dist.get_world_size(group)


def test_collectives_go_on_in_the_background(workers, tmp_path):
    assert workers(2).run(write_together, str(tmp_path)) == [([1, 3, 5], True, "gloo", 2)] * 2


def shard():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    io, whole = AsyncCheckpointIO(), torch.arange(10.0).view(5, 2)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])  # uneven: 3 rows and 2
    tree = {
        "s": sharded,
        "again": sharded,
        "p": torch.nn.Parameter(sharded),
        "r": distribute_tensor(whole, mesh, [Replicate()]),
    }
    for _ in range(2):
        copy = io.stage(tree)
    with torch.no_grad():
        sharded.to_local().fill_(-1)
    same = [
        (c.shape, c.stride(), c.placements, c.dtype) == (sharded.shape, sharded.stride(), (Shard(0),), sharded.dtype)
        for c in (copy["s"], copy["p"])
    ]
    return (
        same,
        copy["s"].device_mesh is mesh,
        copy["s"] is copy["again"],
        copy["s"].full_tensor().tolist() == whole.tolist(),
    )


def test_a_dtensor_is_copied_as_one(workers):
    assert workers(2).run(shard) == [([True, True], True, True, True)] * 2


def sharded_run(folder):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", checkpoint_io="async")
    fabric.launch()
    model = fabric.setup_module(torch.nn.Linear(5, 3))
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.1))

    def step():
        fabric.backward(model(torch.ones(1, 5)).sum())
        optimizer.step()
        optimizer.zero_grad()

    step()
    fabric.save(f"{folder}/a", {"model": model, "optimizer": optimizer, "step": 1})
    before = model.weight.full_tensor().tolist()
    step()
    changed = model.weight.full_tensor().tolist() != before
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(f"{folder}/a", state)
    restored = model.weight.full_tensor().tolist() == before
    fabric.save(f"{folder}/file/a", {"model": model})
    failure = outcome(lambda: fabric.save(f"{folder}/b", {"model": model}))
    return changed, restored, state["step"], failure[0] if failure else None


def test_a_sharded_checkpoint_is_written_in_the_background(workers, tmp_path):
    (tmp_path / "file").touch()  # nothing can be written below it
    for changed, restored, step, failure in workers(2).run(sharded_run, str(tmp_path)):
        assert (changed, restored, step) == (True, True, 1)
        assert failure is not None
    assert not (tmp_path / "b").exists()


LEAVES_FIRST = """
    import sys, threading, time
    import torch
    import torch.distributed as dist
    from fabric_core import Fabric

    class Seven:
        # Takes a moment to write, but not to copy.
        def __reduce__(self):
            if threading.current_thread() is threading.main_thread():
                return Seven, ()
            time.sleep(0.5)
            return int, ("7",)

    torch.serialization.add_safe_globals([Seven])
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", checkpoint_io="async")
    fabric.launch()
    model = fabric.setup_module(torch.nn.Linear(5, 3))
    fabric.save("a", {"model": model, "seven": Seven()})
    if fabric.global_rank == int(sys.argv[1]):
        time.sleep(1.5)
    dist.destroy_process_group()
    if sys.argv[2:]:
        fabric.teardown()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["0"],
        pytest.param(["1"], marks=pytest.mark.slow),
        pytest.param(["2"], marks=pytest.mark.slow),
        ["2", "teardown"],
    ],
    ids=" ".join,
)
def test_a_program_may_destroy_its_groups_before_the_save_is_done(arguments, tmp_path):
    """Whichever rank is the later one, or none."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LEAVES_FIRST))
    command = [sys.executable, str(script), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    loaded = Fabric(accelerator="cpu", devices=1).load(tmp_path / "a", weights_only=False)
    assert loaded["seven"] == 7
    assert loaded["model"]["weight"].shape == (3, 5)


def exchange_without_a_group():
    launched()
    ranks = ranks_of(background_group())
    dist.destroy_process_group()
    mine = "x" * 10**ranks.rank  # of different sizes
    return (
        ranks.broadcast(mine),
        [len(text) for text in ranks.gather(mine)],
        [len(text) for text in ranks.collect(mine) or ()],
        ranks.hand_out(["for zero", {"for": 1}] if ranks.rank == 0 else None),
    )


def test_ranks_exchange_objects_after_their_group_is_destroyed():
    pool = WorkerPool(2)  # of its own: the processes have no group afterwards
    try:
        zero, one = pool.run(exchange_without_a_group)
    finally:
        pool.stop()
    assert zero == ("x", [1, 10], [1, 10], "for zero")
    assert one == ("x", [1, 10], [], {"for": 1})
