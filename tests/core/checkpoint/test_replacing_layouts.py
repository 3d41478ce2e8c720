"""A save in the place of a checkpoint of another layout: after a change of strategy, programs keep their paths."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fabric_core import Fabric
from fabric_core.checkpoint.durable import lock
from fabric_core.checkpoint.folder_commit import commit_folder
from fabric_core.checkpoint.sharded import publication, ranks_of, write_sharded
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


def a_draft(folder: Path, *names: str) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize("save", [save_file, save_sharded, save_notes])
@pytest.mark.parametrize("names", [(LIST, "0.bin"), ("0.bin",), ("manifest.json", "__0_0.distcp"), (".metadata",), ()])
def test_drafts_of_any_layout_that_nobody_works_on_are_removed(
    save: object, names: tuple[str, ...], tmp_path: Path
) -> None:
    a_draft(tmp_path / LEFT, *names)
    save(tmp_path / "ck")  # type: ignore[operator]
    assert os.listdir(tmp_path) == ["ck"]
    if save is not save_file:
        assert sorted(os.listdir(tmp_path / "ck")) == (SHARDED if save is save_sharded else NOTES)


@pytest.mark.parametrize("save", [save_file, save_sharded, save_notes])
@pytest.mark.parametrize("held", [LIST, "manifest.json"])
def test_drafts_of_any_layout_that_somebody_works_on_stay(save: object, held: str, tmp_path: Path) -> None:
    a_draft(tmp_path / LEFT, held, "0.bin", "__0_0.distcp")
    with open(tmp_path / LEFT / held, "r+b") as file:
        lock(file.fileno(), shared=True)
        save(tmp_path / "ck")  # type: ignore[operator]
    assert len(os.listdir(tmp_path / LEFT)) == 3


@pytest.mark.parametrize("exchanges", [True, False])
def test_files_of_others_move_before_anything_is_removed(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody needs to know which files are whose when the marker is gone."""
    if not exchanges:
        monkeypatch.setattr(publication, "exchange", lambda first, second: False)
    (noted(tmp_path / "ck") / "mine.txt").write_text("mine")

    def die(path: str) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as dying:
        dying.setattr(publication, "discard", die)
        with pytest.raises(SystemExit):
            save_sharded(tmp_path / "ck")
    assert (tmp_path / "ck" / "mine.txt").read_text() == "mine"
    save_sharded(tmp_path / "ck")
    assert sorted(os.listdir(tmp_path / "ck")) == sorted([*SHARDED, "mine.txt"])
    assert os.listdir(tmp_path) == ["ck"]


@pytest.mark.parametrize(
    ("before", "save", "name"), [(noted, save_sharded, "meta.pt"), (save_sharded, save_notes, "9.bin")]
)
def test_files_with_the_names_of_new_parts_keep_the_checkpoint_out(
    before: object, save: object, name: str, tmp_path: Path
) -> None:
    before(tmp_path / "ck")  # type: ignore[operator]
    (tmp_path / "ck" / name).write_text("mine")
    with pytest.raises(
        IsADirectoryError, match=f"also holds '{name}', and the new checkpoint has files of these names"
    ):
        save(tmp_path / "ck")  # type: ignore[operator]
    assert (tmp_path / "ck" / name).read_text() == "mine"


def test_files_with_the_names_of_another_layouts_parts_stay(tmp_path: Path) -> None:
    (noted(tmp_path / "ck") / "meta.pt").write_text("mine")
    save_notes(tmp_path / "ck")
    assert (tmp_path / "ck" / "meta.pt").read_text() == "mine"


def test_a_file_that_was_moved_aside_is_read(tmp_path: Path) -> None:
    save_file(tmp_path / ASIDE)
    assert Fabric(accelerator="cpu", devices=1).load(tmp_path / "ck")["w"].sum() == 2
    save_sharded(tmp_path / "ck")
    assert os.listdir(tmp_path) == ["ck"]
