"""``fabric consolidate``, as its users know it, and ``fabric checkpoint consolidate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.write import write_sharded
from fabric_core.cli.main import cli

Fabric = Callable[..., Any]


def run(*words: object) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(sentence: str, *words: object) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert sentence in result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sharded(tmp_path / "run" / "folder", {"model": {"w": torch.ones(2)}}, {"step": 3}, ranks_of(None))
    return tmp_path / "run" / "folder"


@pytest.mark.parametrize("option", ["--output_file", "--output-file"])
def test_the_file_is_written_where_it_was_asked_for(folder: Path, tmp_path: Path, option: str) -> None:
    assert run("consolidate", folder, option, tmp_path / "x.ckpt").exit_code == 0
    assert torch.load(tmp_path / "x.ckpt")["step"] == 3


@pytest.mark.parametrize("command", [["consolidate"], ["checkpoint", "consolidate"]])
def test_by_default_it_goes_beside_the_folder(folder: Path, command: list[str]) -> None:
    result = run(*command, folder)
    assert result.exit_code == 0
    assert f"Written: {folder}.consolidated" in result.output
    assert torch.load(f"{folder}.consolidated")["model"]["w"].tolist() == [1, 1]


def test_nothing_is_overwritten_unless_forced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("mine")
    refused(
        "x.ckpt' exists. Name another file with --output_file",
        *("consolidate", folder, "--output_file"),
        tmp_path / "x.ckpt",
    )
    refused("Name another file with --output", *("checkpoint", "consolidate", folder, "--output"), tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_text() == "mine"
    assert run("checkpoint", "consolidate", folder, "--output", tmp_path / "x.ckpt", "--force").exit_code == 0
    assert torch.load(tmp_path / "x.ckpt")["step"] == 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused("There is no folder", "consolidate", tmp_path / "missing")


def test_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    refused("is a file, not the folder of a sharded checkpoint.", "consolidate", tmp_path / "x")
    hint = f"Did you mean '{folder}'?"
    refused(hint, "consolidate", folder / "meta.pt")


def test_a_folder_without_a_checkpoint_says_where_one_is(folder: Path) -> None:
    refused(f"holds no sharded checkpoint. Did you mean '{folder}'?", "consolidate", folder.parent)
    (folder / "inside").mkdir()
    refused(f"holds no sharded checkpoint. Did you mean '{folder}'?", "consolidate", folder / "inside")
    (folder.parent / "inside").mkdir()
    refused("holds no sharded checkpoint.\n", "consolidate", folder.parent / "inside")


def test_a_store_without_a_checkpoint() -> None:
    refused("There is no sharded checkpoint at 'memory://nothing/x'", "consolidate", "memory://nothing/x")


def test_a_folder_that_cannot_be_written_to(folder: Path) -> None:
    (folder.parent / "file").write_text("")
    refused("file", "consolidate", folder, "--output_file", folder.parent / "file" / "x.ckpt")


def test_a_damaged_folder(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()
    refused("__0_0.distcp is missing", "consolidate", folder)


def test_code_is_run_only_if_told(tmp_path: Path) -> None:
    write_sharded(tmp_path / "x", {"w": torch.ones(2)}, {"args": argparse.Namespace(lr=1)}, ranks_of(None))
    refused("Here that is --no-weights-only.", "consolidate", tmp_path / "x")
    assert run("consolidate", tmp_path / "x", "--no-weights-only").exit_code == 0
    assert torch.load(tmp_path / "x.consolidated", weights_only=False)["args"].lr == 1


def test_the_words_that_are_missing_are_named() -> None:
    assert run("consolidate").exit_code == 2


@pytest.mark.parametrize(
    "words", [["checkpoint", "--help"], ["checkpoint", "convert", "--help"], ["consolidate", "-h"]]
)
def test_help_imports_no_torch(fabric: Fabric, words: list[str]) -> None:
    done = fabric(*words, python=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    assert " torch\n" not in done.stderr
