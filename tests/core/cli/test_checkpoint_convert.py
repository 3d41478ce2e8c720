"""``fabric checkpoint convert`` takes a checkpoint from any form to any other."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from fabric_core import Fabric
from fabric_core.checkpoint.safetensors_io import load_safetensors
from fabric_core.checkpoint.sharded.layout import is_sharded
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.read import open_sharded
from fabric_core.checkpoint.sharded.write import write_sharded
from fabric_core.cli.main import cli

TARGETS = {"file": "y.ckpt", "sharded": "y/", "safetensors": "y.safetensors"}


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)
        self.head.weight = self.embed.weight


def convert(*words: object) -> Result:
    result = CliRunner().invoke(cli, ["checkpoint", "convert", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def converted(*words: object) -> Result:
    result = convert(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(code: int, sentence: str, *words: object) -> None:
    result = convert(*words)
    assert result.exit_code == code
    assert "Error: " in result.output
    assert sentence in result.output


def state(model: torch.nn.Module | None = None) -> dict[str, Any]:
    model = model or Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}


@pytest.fixture
def saved() -> dict[str, Any]:
    return state()


@pytest.fixture
def file(tmp_path: Path, saved: dict[str, Any]) -> Path:
    torch.save(saved, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], value) for key, value in other.items())


@pytest.mark.parametrize(("first", "second"), list(itertools.product(TARGETS, TARGETS)))
def test_weights_survive_every_way(tmp_path: Path, file: Path, saved: dict[str, Any], first: str, second: str) -> None:
    step = tmp_path / "first" / TARGETS[first]
    end = tmp_path / "second" / TARGETS[second]
    for target in (step, end):
        target.parent.mkdir()
    converted(file, f"{step}/" if first == "sharded" else step)
    words = ("--key", "model") if first == "safetensors" and second != "safetensors" else ()
    converted(step, f"{end}/" if second == "sharded" else end, *words)
    converted(end, tmp_path / "end.pt", *(() if second == "safetensors" else ("--key", "model")))
    assert same_weights(torch.load(tmp_path / "end.pt", weights_only=True), saved["model"])


@pytest.mark.parametrize("first", ["file", "sharded"])
def test_the_whole_state_loads_from_a_converted_one(
    tmp_path: Path, file: Path, saved: dict[str, Any], first: str
) -> None:
    target = str(tmp_path / TARGETS[first]) + ("/" if first == "sharded" else "")
    converted(file, target)
    model = Tied()
    fabric = Fabric(accelerator="cpu", devices=1)
    objects = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "step": 0}
    assert fabric.load(target.rstrip("/"), objects) == {}
    assert objects["step"] == 3
    assert same_weights(model.state_dict(), saved["model"])
    loaded = objects["optimizer"].state_dict()["state"]  # type: ignore[attr-defined]
    assert all(same_weights(loaded[number], entries) for number, entries in saved["optimizer"]["state"].items())


def test_a_file_and_a_folder_hold_modules_optimizers_and_extras(tmp_path: Path, file: Path) -> None:
    converted(file, tmp_path / "y", "--to", "sharded")
    with open_sharded(tmp_path / "y") as source:
        assert source.extras == {"step": 3}
        assert {key.partition(".")[0] for key in source.tensors} == {"model", "optimizer"}
    converted(tmp_path / "y", tmp_path / "z", "--to", "file")
    assert list(torch.load(tmp_path / "z")) == ["model", "optimizer", "step"]


def test_tied_weights_are_tied_again(tmp_path: Path, file: Path) -> None:
    converted(file, tmp_path / "w.safetensors")
    loaded = load_safetensors(tmp_path / "w.safetensors")
    assert loaded["embed.weight"] is loaded["head.weight"]
    converted(tmp_path / "w.safetensors", tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt")
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_dtype_changes_the_weights_and_nothing_else(tmp_path: Path, saved: dict[str, Any]) -> None:
    torch.save(
        {**saved, "stats": {"count": torch.tensor(3), "w": torch.ones(1)}, "loss": torch.ones(1)}, tmp_path / "x.ckpt"
    )
    converted(tmp_path / "x.ckpt", tmp_path / "y.ckpt", "--dtype", "bf16")
    loaded = torch.load(tmp_path / "y.ckpt")
    assert {tensor.dtype for tensor in loaded["model"].values()} == {torch.bfloat16}
    assert torch.equal(loaded["model"]["head.bias"], saved["model"]["head.bias"].bfloat16())
    assert loaded["model"]["embed.weight"].data_ptr() == loaded["model"]["head.weight"].data_ptr()
    assert {tensor.dtype for tensor in loaded["optimizer"]["state"][0].values()} == {torch.float32}
    assert loaded["stats"]["count"].dtype == torch.int64
    assert loaded["loss"].dtype == torch.float32


def test_a_name_is_given_to_weights_without_one(tmp_path: Path, saved: dict[str, Any]) -> None:
    torch.save(saved["model"], tmp_path / "w.pt")
    converted(tmp_path / "w.pt", tmp_path / "y.ckpt", "--key", "net")
    assert same_weights(torch.load(tmp_path / "y.ckpt")["net"], saved["model"])
    converted(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert same_weights(load_safetensors(tmp_path / "w.safetensors"), saved["model"])
    refused(2, "--key net", tmp_path / "w.pt", tmp_path / "v.safetensors", "--key", "net")


def test_of_several_modules_one_is_chosen(tmp_path: Path) -> None:
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.zeros(1)}, "step": 1}, tmp_path / "x.ckpt")
    target = tmp_path / "w.safetensors"
    refused(2, "holds the weights of 'a', 'b': say which with --key a", tmp_path / "x.ckpt", target)
    refused(2, "--key c", tmp_path / "x.ckpt", target, "--key", "c")
    converted(tmp_path / "x.ckpt", target, "--key", "b")
    assert load_safetensors(target)["w"].item() == 0


def test_without_weights_there_is_nothing_to_take(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "x.ckpt")
    refused(1, "holds no module's weights: it has 'step'", tmp_path / "x.ckpt", tmp_path / "w.safetensors")
    torch.save([1], tmp_path / "y.ckpt")
    refused(1, "holds a list", tmp_path / "y.ckpt", tmp_path / "w.safetensors")


def test_extra_state_is_left_out_of_safetensors_and_named(tmp_path: Path) -> None:
    weights = {"w": torch.ones(1), "layer._extra_state": {"scale": 1.0}}
    torch.save({"model": weights}, tmp_path / "x.ckpt")
    assert "layer._extra_state" in converted(tmp_path / "x.ckpt", tmp_path / "w.safetensors").output
    assert list(load_safetensors(tmp_path / "w.safetensors")) == ["w"]
    converted(tmp_path / "x.ckpt", tmp_path / "y", "--to", "sharded")
    converted(tmp_path / "y", tmp_path / "y.ckpt")
    assert torch.load(tmp_path / "y.ckpt")["model"]["layer._extra_state"] == {"scale": 1.0}


def test_nothing_is_overwritten_unless_forced(tmp_path: Path, file: Path) -> None:
    for target in ("y.ckpt", "w.safetensors"):
        (tmp_path / target).write_text("mine")
        refused(1, f"{target}' exists. Pass --force", file, tmp_path / target)
        assert (tmp_path / target).read_text() == "mine"
        converted(file, tmp_path / target, "--force")
    converted(file, f"{tmp_path}/folder/")
    refused(1, "exists. Pass --force", file, f"{tmp_path}/folder/")
    converted(file, f"{tmp_path}/folder/", "--force")
    refused(2, "TARGET is SOURCE", file, file, "--force")
    refused(2, "TARGET is SOURCE", "memory://x", "memory://x/", "--to", "sharded")


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path: Path, file: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    refused(1, "mine", file, f"{tmp_path}/mine/", "--force")
    refused(1, "mine", file, tmp_path / "mine", "--to", "file", "--force")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_bad_input(tmp_path: Path, file: Path) -> None:
    refused(2, "does not say which format it should have", file, tmp_path / "target")
    refused(1, "There is no checkpoint at", tmp_path / "none.ckpt", tmp_path / "y.pt")
    refused(1, "is a folder", tmp_path, tmp_path / "y.pt")
    refused(2, "'int4' is not one of", file, tmp_path / "y.pt", "--dtype", "int4")
    refused(2, "'zip' is not one of", file, tmp_path / "y.pt", "--to", "zip")
    (tmp_path / "text.ckpt").write_text("hello")
    refused(1, "text.ckpt", tmp_path / "text.ckpt", tmp_path / "y.pt")
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_sparse_weights_do_not_fit_safetensors(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.eye(2).to_sparse()}}, tmp_path / "x.ckpt")
    refused(1, "'w' is a sparse", tmp_path / "x.ckpt", tmp_path / "w.safetensors")


def test_code_is_run_only_if_told_and_never_for_extras_that_are_not_wanted(tmp_path: Path) -> None:
    write_sharded(tmp_path / "x", {"model": {"w": torch.ones(1)}}, {"args": argparse.Namespace(lr=1)}, ranks_of(None))
    converted(tmp_path / "x", tmp_path / "w.safetensors")
    refused(1, "Here that is --no-weights-only.", tmp_path / "x", tmp_path / "y.ckpt")
    converted(tmp_path / "x", tmp_path / "y.ckpt", "--no-weights-only")
    refused(1, "Here that is --no-weights-only.", tmp_path / "y.ckpt", tmp_path / "z", "--to", "sharded")
    converted(tmp_path / "y.ckpt", tmp_path / "z", "--to", "sharded", "--no-weights-only")
    with open_sharded(tmp_path / "z", weights_only=False) as source:
        assert source.extras["args"].lr == 1


def test_nothing_is_left_behind(tmp_path: Path, file: Path) -> None:
    converted(file, f"{tmp_path}/folder/")
    (tmp_path / "bad.ckpt").write_bytes(file.read_bytes()[:-100])
    convert(tmp_path / "bad.ckpt", f"{tmp_path}/other/")
    assert {path.name for path in tmp_path.iterdir()} == {"x.ckpt", "bad.ckpt", "folder"}


def test_stores(tmp_path: Path, file: Path, saved: dict[str, Any]) -> None:
    converted(file, "memory://convert/folder/")
    assert is_sharded("memory://convert/folder")
    converted("memory://convert/folder", "memory://convert/w.safetensors")
    converted("memory://convert/w.safetensors", "memory://convert/x.ckpt", "--key", "model")
    refused(1, "exists", file, "memory://convert/x.ckpt")
    converted("memory://convert/x.ckpt", tmp_path / "y.ckpt")
    assert same_weights(torch.load(tmp_path / "y.ckpt")["model"], saved["model"])
