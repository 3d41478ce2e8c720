"""``fabric checkpoint inspect`` shows what is in a checkpoint, loads no tensor and runs nothing."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result

from fabric_core.checkpoint.conversion.streams import streamed
from fabric_core.checkpoint.safetensors_io import write_safetensors
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.write import write_sharded
from fabric_core.cli.main import cli

LIGHTNING = Path(__file__).parents[1] / "checkpoint/data/lightning-2.6.6.ckpt"


class Evil:
    """What a hostile file holds: loading it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def inspect(path: object, *options: str) -> Result:
    result = CliRunner().invoke(cli, ["checkpoint", "inspect", str(path), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def facts(path: object, *options: str) -> dict[str, Any]:
    result = inspect(path, "--json", *options)
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.output)
    return content


def state() -> dict[str, Any]:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sharded(tmp_path / "folder", state(), {"step": 3, "args": argparse.Namespace(lr=1)}, ranks_of(None))
    return tmp_path / "folder"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({**state(), "step": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_parts_counts_and_extras(request: pytest.FixtureRequest, kind: str) -> None:
    found = facts(request.getfixturevalue(kind))
    parts = {part["name"]: (part["kind"], part["tensors"], part["elements"]) for part in found["parts"]}
    assert parts["model"] == ("module", 2, 16)
    assert parts["optimizer"] == ("optimizer", 6, 34)
    assert found["extras"] == {"step": "int", "args": "argparse.Namespace"}
    assert (found["tensors"], found["elements"], found["nbytes"]) == (8, 50, 200)
    assert found["dtypes"] == {"float32": 8}


def test_who_wrote_it(folder: Path, tmp_path: Path) -> None:
    found = facts(folder)
    assert (found["format"], found["world_size"]) == ("sharded", 1)
    assert found["written_by"].startswith("Fabric ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp")
    assert facts(tmp_path / "dcp")["written_by"] == "torch.distributed.checkpoint"
    torch.save({"step": 1}, tmp_path / "dcp/meta.pt")
    assert facts(tmp_path / "dcp")["written_by"] == "Lightning Fabric"
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, tmp_path / "trainer.ckpt")
    assert facts(tmp_path / "trainer.ckpt")["written_by"] == "Lightning's Trainer 2.6"


def test_a_file_of_lightning() -> None:
    found = facts(LIGHTNING, "--keys")
    assert {part["name"]: part["kind"] for part in found["parts"]} == {
        "model": "module",
        "optimizer": "optimizer",
        "epoch": "int",
        "probe": "tensor",
    }
    assert {"name": "model.0.weight", "shape": [4, 3], "dtype": "float32", "nbytes": 48, "tied_to": None} in found[
        "keys"
    ]


def test_the_table_shows_keys_and_ties(tmp_path: Path) -> None:
    tied = streamed(torch.ones(2, 3, dtype=torch.bfloat16))
    write_safetensors(tmp_path / "w.safetensors", {"a": tied, "b": tied, "c": streamed(torch.tensor(1))})
    lines = inspect(tmp_path / "w.safetensors", "--keys").output.splitlines()
    assert "format:     safetensors" in lines
    assert "tensors:    2, and 1 tied to one of them" in lines
    assert "(all)  module  2        7         20 bytes" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["a", "2x3", "bfloat16", "12", "bytes"],
        ["c", "scalar", "int64", "8", "bytes"],
        ["b", "2x3", "bfloat16", "as", "a"],
    ]


@pytest.mark.parametrize("options", [(), ("--verify",), ("--keys", "--json")])
def test_nothing_in_the_file_is_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    torch.save({"evil": Evil(tmp_path / "made"), "w": torch.ones(1)}, tmp_path / "x.ckpt")
    write_sharded(tmp_path / "folder", {"w": torch.ones(1)}, {"evil": Evil(tmp_path / "made")}, ranks_of(None))
    for name in ("x.ckpt", "folder"):
        result = inspect(tmp_path / name, *options)
        assert result.exit_code == 0
        assert f"{os.mkdir.__module__}.mkdir" in result.output
    assert not (tmp_path / "made").exists()


def test_objects_of_all_kinds_are_named_not_built(tmp_path: Path) -> None:
    content = {"set": {1}, "bytes": b"x", "sparse": torch.eye(2).to_sparse(), "meta": torch.empty(2, device="meta")}
    torch.save({**content, "p": torch.nn.Parameter(torch.ones(2)), "dtype": torch.float16}, tmp_path / "x.ckpt")
    found = {part["name"]: part["kind"] for part in facts(tmp_path / "x.ckpt")["parts"]}
    assert found == {
        "set": "set",
        "bytes": "bytes",
        "sparse": "sparse tensor",
        "meta": "tensor without values",
        "p": "tensor",
        "dtype": "dtype",
    }


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_whole_is_verified(request: pytest.FixtureRequest, kind: str) -> None:
    result = inspect(request.getfixturevalue(kind), "--verify")
    assert result.exit_code == 0
    assert "Not damaged. Compared: " in result.output


def change(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_damaged_file_of_a_folder_is_listed(folder: Path) -> None:
    change(folder / "__0_0.distcp", 40)
    (folder / "meta.pt").unlink()
    result = inspect(folder, "--verify")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0] == "DAMAGED:"
    assert {line.split()[0] for line in lines[1:]} == {"__0_0.distcp", "meta.pt"}
    damages = json.loads(inspect(folder, "--verify", "--json").output)["damages"]
    assert damages == lines[1:]


def test_a_folder_of_others_is_compared_with_its_index(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(1000)}, checkpoint_id=tmp_path / "dcp")
    assert "Compared: sizes; only Fabric stores hashes" in inspect(tmp_path / "dcp", "--verify").output
    data = tmp_path / "dcp/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    result = inspect(tmp_path / "dcp", "--verify")
    assert (result.exit_code, "__0_0.distcp has 1000 bytes" in result.output) == (1, True)
    data.unlink()
    assert "__0_0.distcp is missing" in inspect(tmp_path / "dcp", "--verify").output


def test_a_changed_byte_of_a_file_is_found(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.ckpt")
    change(tmp_path / "x.ckpt", 2000)
    result = inspect(tmp_path / "x.ckpt", "--verify")
    assert result.exit_code == 1
    assert "x/data/0 has changed" in result.output
    assert inspect(tmp_path / "x.ckpt").exit_code == 0


def test_a_file_without_checksums_is_no_damage(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.zeros(1000)}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    result = inspect(tmp_path / "x.ckpt", "--verify")
    assert (result.exit_code, "without checksums" in result.output) == (0, True)


@pytest.mark.parametrize("options", [(), ("--verify",), ("--json",)])
@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.ckpt", None, "There is no checkpoint at"),
        ("missing.safetensors", None, "There is no checkpoint at"),
        ("text.ckpt", b"hello", "is no checkpoint file, or is damaged"),
        ("cut.ckpt", "cut", "is no checkpoint file, or is damaged"),
        ("empty.ckpt", b"", "is no checkpoint file, or is damaged"),
        ("bad.safetensors", b"x" * 30, "may be damaged"),
        ("number.ckpt", "number", "holds a int, not a dict of named states"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: Any, sentence: str, options: tuple[str, ...]) -> None:
    if content == "number":
        torch.save(3, tmp_path / name)
    elif content == "cut":
        torch.save({"w": torch.ones(10)}, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    result = inspect(tmp_path / name, *options)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert sentence in result.output
    assert name in result.output


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    result = inspect(tmp_path)
    assert result.exit_code == 1
    assert "is a folder that holds no sharded checkpoint" in result.output


def test_a_store(tmp_path: Path) -> None:
    write_sharded("memory://inspect/folder", {"w": torch.ones(2)}, {"step": 1}, ranks_of(None))
    assert facts("memory://inspect/folder")["extras"] == {"step": "int"}
    write_safetensors("memory://inspect/w.safetensors", {"w": streamed(torch.ones(2))})
    assert facts("memory://inspect/w.safetensors")["elements"] == 2
    for name in ("x.ckpt", "x.safetensors"):
        assert "There is no checkpoint at" in inspect(f"memory://inspect/none/{name}").output
