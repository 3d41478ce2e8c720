"""The commands for checkpoints, given a folder that only a plugin can read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fabric_core.cli.main import cli
from fabric_core.registry import get_registry

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "checkpoint"))
from noted_format import NotesPlugin, write_notes  # type: ignore[import-not-found]


def run(*words: object) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    undo = get_registry().add_hooks(NotesPlugin())
    weight = torch.arange(6.0).view(2, 3)
    write_notes(tmp_path / "noted", {"net": {"w": weight, "tied": weight, "b": torch.ones(2)}}, step=3)
    yield tmp_path / "noted"
    undo()


@pytest.mark.parametrize("command", [["consolidate"], ["checkpoint", "consolidate"]])
def test_it_becomes_one_file(folder: Path, command: list[str]) -> None:
    assert run(*command, folder).exit_code == 0
    content = torch.load(f"{folder}.consolidated")
    assert content["step"] == 3
    assert content["net"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert content["net"]["w"].data_ptr() == content["net"]["tied"].data_ptr()


def test_its_weights_become_safetensors(folder: Path, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert run("checkpoint", "convert", folder, tmp_path / "x.safetensors").exit_code == 0
    assert load_file(tmp_path / "x.safetensors")["b"].tolist() == [1, 1]


def test_it_becomes_a_sharded_folder(folder: Path, tmp_path: Path) -> None:
    from fabric_core import Fabric

    assert run("checkpoint", "convert", folder, tmp_path / "sharded", "--to", "sharded").exit_code == 0
    content = Fabric(accelerator="cpu", devices=1).load(tmp_path / "sharded")
    assert (content["step"], content["net"]["w"].tolist()) == (3, [[0, 1, 2], [3, 4, 5]])


def test_what_is_in_it_is_shown(folder: Path) -> None:
    content = json.loads(run("checkpoint", "inspect", folder, "--json", "--keys").output)
    assert (content["format"], content["tensors"], content["elements"]) == ("notes", 2, 8)
    assert content["extras"] == {"step": "int"}
    assert {row["name"]: row["tied_to"] for row in content["keys"]} == {
        "net.w": None,
        "net.tied": "net.w",
        "net.b": None,
    }


def test_checksums_of_files_inside_are_compared(folder: Path) -> None:
    torch.save({"noise": torch.rand(1000)}, folder / "extra.pt")
    assert (
        "Not damaged. Compared: checksums, of the files that have some."
        in run(*("checkpoint", "inspect", folder, "--verify")).output
    )
    content = bytearray((folder / "extra.pt").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "extra.pt").write_bytes(content)
    result = run("checkpoint", "inspect", folder, "--verify")
    assert result.exit_code == 1
    assert "extra.pt: " in result.output
    (folder / "extra.pt").write_bytes(content[: len(content) // 2])
    assert "extra.pt is damaged" in run("checkpoint", "inspect", folder, "--verify").output


def test_what_is_only_read_by_running_code_is_refused(folder: Path, tmp_path: Path) -> None:
    write_notes(tmp_path / "unsafe", {}, code="x")
    result = run("consolidate", tmp_path / "unsafe")
    assert result.exit_code == 1
    assert "It holds code. Pass weights_only=False. Here that is --no-weights-only." in result.output
    assert run("consolidate", tmp_path / "unsafe", "--no-weights-only").exit_code == 0


def test_a_folder_beside_it_is_pointed_at(folder: Path) -> None:
    result = run("consolidate", folder.parent)
    assert f"holds no sharded checkpoint. Did you mean '{folder}'?" in result.output
