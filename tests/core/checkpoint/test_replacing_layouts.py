"""A save in the place of a checkpoint of another layout: after a change of strategy, programs keep their paths."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fabric_core import Fabric
from fabric_core.checkpoint.folder_commit import commit_folder
from fabric_core.checkpoint.sharded import ranks_of, write_sharded
from fabric_core.registry import get_registry

sys.path.insert(0, os.path.dirname(__file__))
from noted_format import LAYOUT, LIST, NotesPlugin, NotesReader, write_notes  # type: ignore[import-not-found]

ASIDE = ".ck.0123456789abcdef.previous"
LEFT = ".ck.0123456789abcdef.partial"


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    undo = get_registry().add_hooks(NotesPlugin())
    yield
    undo()


def save_file(path: Path) -> None:
    Fabric(accelerator="cpu", devices=1).save(path, {"w": torch.ones(2)})


def save_sharded(path: Path) -> None:
    write_sharded(path, {"model": {"w": torch.ones(2)}}, {}, ranks_of())


def save_notes(path: Path) -> None:
    commit_folder(path, lambda folder: Path(folder, "0.bin").touch() and None, b"{}", LAYOUT, ranks_of())


def noted(path: Path) -> Path:
    write_notes(path, {"model": {"w": torch.zeros(2)}}, step=1)
    return path


SHARDED = [".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
NOTES = ["0.bin", LIST]


def test_a_file_takes_the_place_of_a_plugins_folder(tmp_path: Path) -> None:
    save_file(noted(tmp_path / "ck"))
    assert torch.load(tmp_path / "ck")["w"].sum() == 2
    assert os.listdir(tmp_path) == ["ck"]


def test_what_else_is_in_the_folder_keeps_the_file_out(tmp_path: Path) -> None:
    (noted(tmp_path / "ck") / "mine.txt").touch()
    with pytest.raises(IsADirectoryError, match=r"also holds 'mine.txt'"):
        save_file(tmp_path / "ck")
    assert sorted(os.listdir(tmp_path / "ck")) == ["0.bin", "mine.txt", LIST]
    assert os.listdir(tmp_path) == ["ck"]


def test_a_sharded_checkpoint_takes_its_place_and_other_files_stay(tmp_path: Path) -> None:
    (noted(tmp_path / "ck") / "mine.txt").touch()
    save_sharded(tmp_path / "ck")
    assert sorted(os.listdir(tmp_path / "ck")) == sorted([*SHARDED, "mine.txt"])
    assert os.listdir(tmp_path) == ["ck"]


def test_a_plugins_folder_takes_the_place_of_a_sharded_one(tmp_path: Path) -> None:
    save_sharded(tmp_path / "ck")
    (tmp_path / "ck" / "mine.txt").touch()
    save_notes(tmp_path / "ck")
    assert sorted(os.listdir(tmp_path / "ck")) == sorted([*NOTES, "mine.txt"])
    assert os.listdir(tmp_path) == ["ck"]


@pytest.mark.parametrize("save", [save_file, save_sharded])
def test_a_layout_of_which_nobody_knows_the_parts_is_left_alone(
    save: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NotesReader, "layout", None)
    noted(tmp_path / "ck")
    with pytest.raises(IsADirectoryError):
        save(tmp_path / "ck")  # type: ignore[operator]
    assert sorted(os.listdir(tmp_path / "ck")) == NOTES


@pytest.mark.parametrize(("save", "names"), [(save_file, None), (save_sharded, SHARDED)])
def test_what_an_interrupted_replacement_moved_aside_goes_too(
    save: object, names: list[str] | None, tmp_path: Path
) -> None:
    noted(tmp_path / ASIDE)
    save(tmp_path / "ck")  # type: ignore[operator]
    assert os.listdir(tmp_path) == ["ck"]
    assert names is None or sorted(os.listdir(tmp_path / "ck")) == names


def test_drafts_of_another_layout_that_nobody_works_on_are_removed(tmp_path: Path) -> None:
    noted(tmp_path / LEFT)
    save_sharded(tmp_path / "ck")
    assert sorted(os.listdir(tmp_path / "ck")) == SHARDED
    (tmp_path / LEFT).mkdir()
    for name in ("manifest.json", "__0_0.distcp"):
        (tmp_path / LEFT / name).touch()
    save_notes(tmp_path / "ck")
    assert sorted(os.listdir(tmp_path / "ck")) == NOTES
    assert os.listdir(tmp_path) == ["ck"]
