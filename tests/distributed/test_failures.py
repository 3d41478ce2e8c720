"""What one rank's failure means for the others, and checkpoints between worlds of different sizes."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.errors import WorkerFailedError


def launched(**arguments):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", **arguments)
    fabric.launch()
    return fabric


def prepared(fabric, value, steps=2):
    module = nn.Linear(2, 1)
    nn.init.constant_(module.weight, value)
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.1))
    for _ in range(steps):
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_two(path):
    fabric = launched()
    model, optimizer = prepared(fabric, 1.0)
    fabric.save(path, {"model": model, "optimizer": optimizer, "epoch": 5})
    return model.weight.tolist()


def load_two(path):
    fabric = launched()
    model, optimizer = prepared(fabric, 7.0, steps=0)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    rest = fabric.load(path, state)
    return model.weight.tolist(), int(optimizer.state_dict()["state"][0]["step"]), state["epoch"], rest


def test_two_processes_save_what_one_loads(workers, tmp_path):
    weight, _ = workers(2).run(save_two, str(tmp_path / "a.ckpt"))
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = prepared(fabric, 7.0, steps=0)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    assert fabric.load(tmp_path / "a.ckpt", state) == {}
    assert model.weight.tolist() == weight
    assert (optimizer.state_dict()["state"][0]["step"], state["epoch"]) == (2, 5)


def test_one_process_saves_what_two_load(workers, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = prepared(fabric, 1.0)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "epoch": 5, "more": "rest"})
    expected = (model.weight.tolist(), 2, 5, {"more": "rest"})
    assert workers(2).run(load_two, str(tmp_path / "a.ckpt")) == [expected] * 2


def test_a_saved_file_is_there_for_every_rank_at_once(workers, tmp_path):
    workers(2).run(save_and_load, str(tmp_path / "a.ckpt"))


def save_and_load(path):
    fabric = launched()
    fabric.save(path, {"epoch": 1})
    assert fabric.load(path) == {"epoch": 1}


def load_raw(path):
    fabric = launched()
    model, _ = prepared(fabric, 7.0, steps=0)
    fabric.load_raw(path, model)
    return model.weight.tolist()


def test_a_bare_state_dict_loads_on_every_rank(workers, tmp_path):
    torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, tmp_path / "raw.pt")
    assert workers(2).run(load_raw, str(tmp_path / "raw.pt")) == [[[1.0, 1.0]]] * 2


class Failing:
    """Something whose state cannot be had, or taken, on one rank."""

    def __init__(self, fails):
        self.fails = fails

    def state_dict(self):
        if self.fails:
            raise LookupError("no state on this rank")
        return {}

    def load_state_dict(self, state):
        self.state_dict()


def attempt(what, path, rank):
    fabric = launched()
    failing = Failing(fabric.global_rank == rank)
    try:
        getattr(fabric, what)(path, {"failing": failing})
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        failure = "none"
    return failure, fabric.all_reduce(1.0, reduce_op="sum").item()


@pytest.mark.parametrize("what", ["save", "load"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_is_a_failure_on_all(what, rank, workers, tmp_path):
    path = tmp_path / "a.ckpt"
    if what == "load":
        torch.save({"failing": {}}, path)
    answers = workers(2).run(attempt, what, str(path), rank)
    mine, other = answers[rank][0], answers[1 - rank][0]
    assert mine == "LookupError: no state on this rank"
    assert other.startswith("CheckpointError")
    assert "failed on another rank; its error says why" in other
    assert [answer[1] for answer in answers] == [2.0, 2.0]


def test_a_save_that_failed_on_rank_zero_leaves_the_older_file(workers, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save("older", path)
    workers(2).run(attempt, "save", str(path), 0)
    assert torch.load(path) == "older"


def load_missing(path):
    fabric = launched()
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        fabric.load(path)
    return fabric.all_reduce(1.0, reduce_op="sum").item()


def test_a_missing_file_is_missing_for_all(workers, tmp_path):
    assert workers(2).run(load_missing, str(tmp_path / "missing.ckpt")) == [2.0, 2.0]


def different_plans():
    import os

    rank = int(os.environ["RANK"])
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true" if rank else "32-true")
    try:
        fabric.launch()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "launched"


def test_a_rank_that_resolved_something_else_is_told(workers):
    pool = workers(2)
    first, second = pool.run(different_plans)
    assert "64-true" in second
    assert "rank 0" in second
    assert first in ("launched", second)


def wrong_number():
    Fabric(accelerator="cpu", devices=3, strategy="ddp")


def test_another_number_of_devices_than_processes_is_refused(workers):
    with pytest.raises(WorkerFailedError, match="3 processes, but 2 were started"):
        workers(2).run(wrong_number)


def auto():
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    return fabric.world_size, fabric.plan.strategy.name, str(fabric.device)


def test_auto_takes_the_processes_that_are_there(workers):
    assert workers(2).run(auto) == [(2, "ddp", "cpu")] * 2


def launch_twice():
    fabric = launched()
    first = fabric.launch(lambda f, x: (f.global_rank, x), "a")
    fabric.launch()
    return first, fabric.launch(lambda f: f.broadcast(f.global_rank, 1))


def test_launch_runs_functions_in_the_processes_that_are_there(workers):
    assert workers(2).run(launch_twice) == [((0, "a"), 1), ((1, "a"), 1)]
