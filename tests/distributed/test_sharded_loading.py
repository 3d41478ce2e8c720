"""What sharded models load that others wrote, and who reads it."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from distributed.sharded_network import launched, message, same, set_up, states, whole
from distributed.small_model import needs_fsdp
from fabric_core import Fabric
from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.strategies import ModelParallelStrategy

pytestmark = needs_fsdp
LIGHTNING = Path(__file__).parents[1] / "data" / "lightning"


# What others wrote


def from_lightning(names):
    for name in names:
        for strategy in (None, ModelParallelStrategy(over_tensors, data_parallel_size=1, tensor_parallel_size=2)):
            fabric = launched(strategy=strategy)
            check_lightning(fabric, LIGHTNING / name)


def over_tensors(module, mesh):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    plan = {"1": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def check_lightning(fabric, path):
    torch.manual_seed(5)
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, affine=False)), nn.Linear(6, 3))
    groups = [{"params": [p for p in module.parameters() if p.dim() == dim]} for dim in (1, 2)]
    model, optimizer = fabric.setup(module, torch.optim.AdamW(groups))
    state = {"model": model, "optimizer": optimizer, "steps": 0}
    assert fabric.load(path, state) == {"note": {"by": "Lightning"}}
    assert state["steps"] == 2
    probe = torch.load(f"{path}.probe")
    model.eval()
    torch.testing.assert_close(model(probe["inputs"]), probe["outputs"])
    wanted = torch.load(f"{path}".replace("-sharded", "-full"))["optimizer"]
    (found,) = states(optimizer)
    ids = [id_ for group in wanted["param_groups"] for id_ in group.pop("params")]
    assert [group.pop("params") for group in found["param_groups"]] == [[0, 1], [2, 3]]
    assert found["param_groups"] == wanted["param_groups"]
    assert same(found["state"], {number: wanted["state"][id_] for number, id_ in enumerate(ids)})


NAMES = sorted(path.stem for path in LIGHTNING.glob("*.probe"))


def test_checkpoints_of_lightning_load_in_all_their_forms(workers):
    assert len(NAMES) == 7
    workers(2).run(from_lightning, NAMES)
    for name in NAMES:
        check_lightning(Fabric(accelerator="cpu", devices=1), LIGHTNING / name)


# Who reads


@contextmanager
def standing_in(folder):
    before = Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def seen_by_rank_zero_only(folder):
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, optimizer = set_up(fabric, steps=1)
        state = {"model": model, "optimizer": optimizer, "step": 1, "more": torch.arange(3)}
        fabric.save(folder / form, state)
        expected = states(model, optimizer)
        with standing_in(folder if fabric.global_rank == 0 else folder / "elsewhere"):
            for loading in (fabric, launched(strategy="ddp")):
                other, its_optimizer = set_up(loading, seed=1)
                state = {"model": other, "optimizer": its_optimizer, "step": 0}
                rest = loading.load(form, state)
                assert same(states(other, its_optimizer), expected)
                assert (state["step"], rest["more"].tolist()) == (1, [0, 1, 2])
            assert loading.load(form)["step"] == 1
    return message(loading.load, "nowhere")


def test_what_only_rank_zero_sees_it_reads_for_all(tmp_path, workers):
    first, second = workers(2).run(seen_by_rank_zero_only, tmp_path)
    assert first.startswith("FileNotFoundError: There is no checkpoint at 'nowhere'")
    assert first[:10] == second[:10]


def in_memory_of_rank_zero():
    fabric = launched("full")
    model, optimizer = set_up(fabric, steps=1)
    fabric.save("memory://sharded-checkpoints/x", {"model": model, "optimizer": optimizer})
    other, its_optimizer = set_up(fabric, seed=1)
    fabric.load("memory://sharded-checkpoints/x", {"model": other, "optimizer": its_optimizer})
    return same(states(other, its_optimizer), states(model, optimizer))


def test_a_file_that_cannot_be_read_in_parts_is_read_once(workers):
    assert workers(2).run(in_memory_of_rank_zero) == [True, True]


class Simple(CheckpointIO):
    """Only what the contract demands."""

    def save_checkpoint(self, checkpoint, path):
        torch.save(checkpoint, f"{path}.simple")

    def load_checkpoint(self, path):
        return torch.load(f"{path}.simple")

    def remove_checkpoint(self, path):
        os.unlink(f"{path}.simple")


def through_an_io(path):
    fabric = launched("full", plugins=[Simple()])
    model, optimizer = set_up(fabric, steps=1)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    other, its_optimizer = set_up(fabric, seed=1)
    fabric.load(path, {"model": other, "optimizer": its_optimizer})
    assert same(states(other, its_optimizer), states(model, optimizer))
    fabric = launched("sharded", plugins=[Simple()])
    return message(fabric.save, path, {"model": set_up(fabric)[0]})


def test_full_checkpoints_go_through_any_checkpoint_io_and_sharded_ones_say_that_they_do_not(tmp_path, workers):
    for text in workers(2).run(through_an_io, tmp_path / "x"):
        assert "UnsupportedError: Simple writes the checkpoint of one process" in text


def averages(folder):
    fabric = launched()
    model, optimizer = set_up(fabric, steps=1)
    shadow = {name: value.clone() for name, value in model.state_dict().items()}
    expected = whole(shadow)
    values = {"ema": {"weights": shadow, "decay": 0.9}, "one": shadow["0.weight"], "step": 3}
    rest = {"ema": {"weights": expected, "decay": 0.9}, "one": expected["0.weight"], "step": 3}
    fabric.save(folder / "x", {"model": model, "optimizer": optimizer, **values})
    found = [fabric.load(folder / "x", {"model": model})]
    found.append(fabric.load(folder / "x", {"optimizer": optimizer, "model": model, "one": None}))
    background = launched(checkpoint_io="async")
    background.save(folder / "y", {"model": model, "optimizer": optimizer, **values})
    found.append(background.load(folder / "y", {"model": model}))
    fabric.save(folder / "only", {"ema": shadow})
    for name in ("x", "only"):
        fabric.load_raw(folder / name, model)
    left = {key: value for key, value in rest.items() if key != "one"}
    assert [same(one, other) for one, other in zip(found, (rest, left, rest), strict=True)] == [True] * 3
    tensors = [*found[0]["ema"]["weights"].values(), found[0]["one"]]
    assert {(type(tensor), tensor.device.type) for tensor in tensors} == {(torch.Tensor, "cpu")}


def test_sharded_values_of_no_module_and_no_optimizer_are_returned_unasked(tmp_path, workers):
    workers(2).run(averages, tmp_path)
