"""A sharded checkpoint becomes the file that one process would have written."""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from fabric_core import Fabric
from fabric_core.checkpoint.conversion.consolidate import consolidate
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.write import write_sharded
from fabric_core.errors import CheckpointError, UnsafeCheckpointError


def make(optimizer=torch.optim.AdamW, **options):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = optimizer(model.parameters(), lr=0.1, **options)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def portable(model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def plain_dcp(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path)


def foreign(path, state, extras):
    """As Lightning leaves it."""
    plain_dcp(path, state)
    torch.save(extras, path / "meta.pt")


def ours(path, state, extras):
    write_sharded(path, state, extras, ranks_of(None))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("write", [ours, foreign])
@pytest.mark.parametrize("mmap", [False, True])
def test_the_file_is_nested_as_saved_with_the_extras_beside(tmp_path, write, mmap):
    state = portable(*make())
    extras = {"step": 3, "history": [1.5, {"a": (1, 2)}], "rng": torch.arange(3)}
    write(tmp_path / "folder", state, extras)
    consolidate(tmp_path / "folder", tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=mmap)
    assert equal(loaded, {**state, **extras})


def test_by_default_it_goes_beside_the_folder(tmp_path):
    plain_dcp(tmp_path / "folder.ckpt", {"w": torch.ones(3), "n": 3})
    assert consolidate(f"{tmp_path}/folder.ckpt/") == f"{tmp_path}/folder.ckpt.consolidated"
    loaded = torch.load(tmp_path / "folder.ckpt.consolidated")
    assert equal(loaded, {"w": torch.ones(3), "n": 3})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_fabric_loads_the_file(tmp_path, optimizer):
    model, trained = make(optimizer)
    ours(tmp_path / "folder", portable(model, trained), {"step": 3})
    file = consolidate(tmp_path / "folder")
    fabric = Fabric(accelerator="cpu", devices=1)
    state = dict(zip(("model", "optimizer"), fabric.setup(*make(optimizer)), strict=True)) | {"step": 0}
    fabric.load(file, state)
    assert state["step"] == 3
    assert equal(state["model"].state_dict(), model.state_dict())
    assert equal(state["optimizer"].state_dict()["state"], trained.state_dict()["state"])


def test_an_optimizer_that_was_numbered_is_numbered_again(tmp_path):
    state = make()[1].state_dict()
    ours(tmp_path / "folder", {"optimizer": state}, {})
    assert equal(torch.load(consolidate(tmp_path / "folder"))["optimizer"], state)


def test_an_optimizer_without_state_keeps_its_form(tmp_path):
    state = make(torch.optim.SGD)[1].state_dict()
    ours(tmp_path / "folder", {"optimizer": state, "w": torch.ones(1)}, {})
    loaded = torch.load(consolidate(tmp_path / "folder"))
    assert loaded["optimizer"]["state"] == {}
    assert equal(loaded["optimizer"]["param_groups"], state["param_groups"])


def test_objects_that_would_run_code_are_refused_unless_told_otherwise(tmp_path):
    foreign(tmp_path / "folder", {"w": torch.ones(1)}, {"args": argparse.Namespace(lr=1)})
    with pytest.raises(UnsafeCheckpointError, match=r"argparse\.Namespace"):
        consolidate(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    file = consolidate(tmp_path / "folder", weights_only=False)
    assert torch.load(file, weights_only=False)["args"].lr == 1


def test_a_damaged_folder_leaves_no_file(tmp_path):
    ours(tmp_path / "folder", {"w": torch.ones(1000)}, {})
    data = next((tmp_path / "folder").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        consolidate(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        consolidate(tmp_path / "folder")


def test_stores_are_read_and_written():
    plain = {"model": {"w": torch.arange(100.0)}}
    ours("memory://consolidate/folder", plain, {"step": 1})
    file = consolidate("memory://consolidate/folder")
    assert file == "memory://consolidate/folder.consolidated"
    loaded = Fabric(accelerator="cpu", devices=1).load(file)
    assert equal(loaded, {**plain, "step": 1})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and resets its peak")
def test_no_more_than_a_tensor_is_in_memory(tmp_path):
    tensors = {f"{n}": torch.ones(2**21) for n in range(12)}  # 8 MiB each
    ours(tmp_path / "folder", {"model": tensors}, {})
    script = str(Path(__file__).with_name("peak_while_consolidating.py"))
    words = [sys.executable, script, str(tmp_path / "folder")]
    peak = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert peak < 6 * 2**23  # of 12
