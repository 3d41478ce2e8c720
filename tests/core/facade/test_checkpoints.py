"""Saving and loading through the facade: what happens to the caller's objects and to the caller's dict."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.errors import CheckpointKeyError


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def wrapping(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2)
    fabric.launch()
    return fabric


def trained(fabric, value=1.0, steps=1):
    """A set-up module and optimizer after some steps."""
    module = nn.Linear(2, 1)
    nn.init.constant_(module.weight, value)
    module, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.1))
    for _ in range(steps):
        fabric.backward(module(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


class Counter:
    def __init__(self, n=0):
        self.n = n

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_objects_are_restored_in_place(fabric, tmp_path):
    module, optimizer = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": module, "optimizer": optimizer, "counter": Counter(4)})
    other, other_optimizer = trained(fabric, 9.0, steps=0)
    weight, counter = other.weight, Counter()
    fabric.load(tmp_path / "a.ckpt", {"model": other, "optimizer": other_optimizer, "counter": counter})
    assert other.weight is weight
    assert torch.equal(weight, module.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1
    assert counter.n == 4


def test_plain_values_are_replaced_in_the_callers_dict(fabric, tmp_path):
    fabric.save(tmp_path / "a.ckpt", {"epoch": 3, "best": 0.5, "names": ["a", "b"]})
    state = {"epoch": 0, "names": None}
    rest = fabric.load(tmp_path / "a.ckpt", state)
    assert state == {"epoch": 3, "names": ["a", "b"]}
    assert rest == {"best": 0.5}


def test_the_callers_dict_keeps_the_wrapped_objects(fabric, tmp_path):
    module, optimizer = trained(fabric)
    state = {"model": module, "optimizer": optimizer, "epoch": 1}
    fabric.save(tmp_path / "a.ckpt", state)
    fabric.load(tmp_path / "a.ckpt", state)
    assert state["model"] is module
    assert state["optimizer"] is optimizer


def test_without_a_state_the_whole_file_comes_back(fabric, tmp_path):
    module, _ = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": module, "epoch": 2})
    whole = fabric.load(tmp_path / "a.ckpt")
    assert whole["epoch"] == 2
    assert set(whole["model"]) == {"weight", "bias"}


def test_the_file_is_one_that_torch_reads(fabric, tmp_path):
    module, _ = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": module})
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=True)["model"]["weight"], module.weight)


def test_keys_carry_no_wrappers_prefix(wrapping, tmp_path):
    module, _ = trained(wrapping)
    wrapping.save(tmp_path / "a.ckpt", {"model": module})
    assert set(wrapping.load(tmp_path / "a.ckpt")["model"]) == {"weight", "bias"}


def test_a_wrapped_module_is_restored_from_a_bare_ones_file(wrapping, fabric, tmp_path):
    bare, _ = trained(fabric, 3.0)
    fabric.save(tmp_path / "a.ckpt", {"model": bare})
    module, _ = trained(wrapping, 0.0, steps=0)
    wrapping.load(tmp_path / "a.ckpt", {"model": module})
    assert torch.equal(module.weight, bare.weight)


def test_missing_names_are_all_listed_and_nothing_is_changed(fabric, tmp_path):
    fabric.save(tmp_path / "a.ckpt", {"model": nn.Linear(2, 1), "epoch": 3})
    module = nn.Linear(2, 1)
    before, state = module.weight.clone(), {"model": module, "epoch": 0, "one": 1, "two": 2}
    with pytest.raises(CheckpointKeyError, match="no 'one', 'two'"):
        fabric.load(tmp_path / "a.ckpt", state)
    assert torch.equal(module.weight, before)
    assert state["epoch"] == 0


def test_what_is_there_can_be_loaded_alone(fabric, tmp_path):
    fabric.save(tmp_path / "a.ckpt", {"epoch": 3})
    state = {"epoch": 0, "absent": "as before"}
    assert fabric.load(tmp_path / "a.ckpt", state, strict=False) == {}
    assert state == {"epoch": 3, "absent": "as before"}


def test_a_module_that_does_not_match_is_refused_unless_lenient(fabric, tmp_path):
    fabric.save(tmp_path / "a.ckpt", {"model": nn.Linear(2, 1, bias=False)})
    module = nn.Linear(2, 1)
    with pytest.raises(Exception, match="bias"):
        fabric.load(tmp_path / "a.ckpt", {"model": module})
    fabric.load(tmp_path / "a.ckpt", {"model": module}, strict=False)


def test_a_filter_keeps_what_it_likes(fabric, tmp_path):
    module, _ = trained(fabric)
    fabric.save(
        tmp_path / "a.ckpt",
        {"model": module, "epoch": 3},
        filter={"model": lambda key, value: key == "weight"},
    )
    assert set(fabric.load(tmp_path / "a.ckpt")["model"]) == {"weight"}


def test_load_raw_fills_a_module(fabric, tmp_path):
    bare = nn.Linear(2, 1)
    torch.save(bare.state_dict(), tmp_path / "raw.pt")
    module = fabric.setup(nn.Linear(2, 1))
    assert fabric.load_raw(tmp_path / "raw.pt", module) is None
    assert torch.equal(module.weight, bare.weight)


def test_load_raw_fills_a_module_behind_a_wrapper(wrapping, tmp_path):
    bare = nn.Linear(2, 1)
    torch.save(bare.state_dict(), tmp_path / "raw.pt")
    module = wrapping.setup(nn.Linear(2, 1))
    wrapping.load_raw(tmp_path / "raw.pt", module)
    assert torch.equal(module.weight, bare.weight)


def test_load_raw_fills_an_optimizer(fabric, tmp_path):
    _, optimizer = trained(fabric, steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "raw.pt")
    _, other = trained(fabric, steps=0)
    fabric.load_raw(tmp_path / "raw.pt", other)
    assert other.state_dict()["state"][0]["step"] == 3


def test_load_raw_is_strict_unless_told_otherwise(fabric, tmp_path):
    torch.save({"weight": torch.ones(1, 2)}, tmp_path / "raw.pt")
    module = nn.Linear(2, 1)
    with pytest.raises(Exception, match="bias"):
        fabric.load_raw(tmp_path / "raw.pt", module)
    fabric.load_raw(tmp_path / "raw.pt", module, strict=False)
    assert module.weight.tolist() == [[1.0, 1.0]]


class Unsafe:
    pass


def test_load_raw_runs_no_code_unless_trusted(fabric, tmp_path):
    torch.save({"weight": torch.ones(1, 2), "note": Unsafe()}, tmp_path / "raw.pt")
    module = nn.Linear(2, 1, bias=False)
    with pytest.raises(Exception, match="weights_only"):
        fabric.load_raw(tmp_path / "raw.pt", module, strict=False)
    fabric.load_raw(tmp_path / "raw.pt", module, strict=False, weights_only=False)
    assert module.weight.tolist() == [[1.0, 1.0]]


def test_a_save_that_fails_leaves_the_older_file(fabric, tmp_path):
    fabric.save(tmp_path / "a.ckpt", {"epoch": 1})
    with pytest.raises(Exception, match="loader"):
        fabric.save(tmp_path / "a.ckpt", {"epoch": 2, "loader": torch.utils.data.DataLoader([1])})
    assert fabric.load(tmp_path / "a.ckpt") == {"epoch": 1}


def test_a_permission_error_is_not_hidden(fabric, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exception, match="file"):
        fabric.save(tmp_path / "file" / "a.ckpt", {"epoch": 1})


def test_the_precisions_state_is_saved_like_any_objects(tmp_path):
    from fabric_core.plugins import MixedPrecision

    fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", device="cpu"))
    precision = fabric.strategy.precision
    precision.scaler.scale(torch.ones(1))
    precision.scaler.update(128.0)
    fabric.save(tmp_path / "a.ckpt", {"precision": precision})
    precision.scaler.update(2.0)
    fabric.load(tmp_path / "a.ckpt", {"precision": precision})
    assert precision.scaler.get_scale() == 128.0


def test_load_names_what_to_call_for_a_single_object(fabric, tmp_path):
    with pytest.raises(TypeError, match=r"fabric\.load_raw"):
        fabric.load(tmp_path / "a.ckpt", nn.Linear(2, 2))


def test_a_file_takes_the_place_of_a_sharded_checkpoint(fabric, tmp_path):
    from fabric_core.checkpoint.sharded import ranks_of, write_sharded

    path = tmp_path / "checkpoint"
    write_sharded(path, {"model": {"weight": torch.ones(2)}}, {"step": 1}, ranks_of())
    fabric.save(path, {"step": 2})
    assert path.is_file()
    assert fabric.load(path) == {"step": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_is_no_checkpoint_stays(fabric, tmp_path):
    (tmp_path / "mine").write_text("words")
    with pytest.raises(IsADirectoryError):
        fabric.save(tmp_path, {"step": 2})
    assert (tmp_path / "mine").read_text() == "words"
