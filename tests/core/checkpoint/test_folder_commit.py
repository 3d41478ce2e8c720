"""A folder that all ranks write through ``commit_folder``: there completely, or what was there before still is."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric_core.checkpoint.folder_commit import FolderLayout, commit_folder, find_folder
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.errors import CheckpointError, UnsupportedError

LAYOUT = FolderLayout(marker="done", held="done", is_part=lambda name: name == "done" or name.startswith("part"))


def save(path: Any, text: str, name: str = "part") -> None:
    commit_folder(path, lambda folder: Path(folder, name).write_text(text) and None, text.encode(), LAYOUT, ranks_of())


def found(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_files_and_marker_are_there(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "x", "one")
    assert found(tmp_path / "deep" / "x") == {"part": "one", "done": "one"}
    assert os.listdir(tmp_path / "deep") == ["x"]


def test_it_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    save(tmp_path / "x", "one", "part-of-the-old-one")
    (tmp_path / "x" / "mine.txt").write_text("mine")
    (tmp_path / "x" / "folder").mkdir()
    (tmp_path / "x" / "folder" / "also.txt").write_text("mine")
    save(tmp_path / "x", "two")
    assert found(tmp_path / "x") == {"part": "two", "done": "two", "mine.txt": "mine", "folder/also.txt": "mine"}
    assert os.listdir(tmp_path) == ["x"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path / "x", "one")

    def write(folder: str) -> None:
        Path(folder, "part").write_text("two")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        commit_folder(tmp_path / "x", write, b"two", LAYOUT, ranks_of())
    assert found(tmp_path / "x") == {"part": "one", "done": "one"}
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match="holds other things than a checkpoint"):
        save(tmp_path / "x", "one")
    assert found(tmp_path / "x") == {"mine.txt": "mine"}


def test_a_store_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'memory://x' is in a store"):
        save("memory://x", "one")


def test_what_an_interrupted_replacement_moved_aside_counts_until_the_next_save(tmp_path: Path) -> None:
    save(tmp_path / "x", "one")
    aside = tmp_path / f".x.{'0' * 16}.previous"
    (tmp_path / "x").rename(aside)
    assert find_folder(tmp_path / "x", LAYOUT) == str(aside)
    save(tmp_path / "x", "two")
    assert (found(tmp_path / "x")["part"], os.listdir(tmp_path)) == ("two", ["x"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_a_killed_process_leaves_is_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path / "x", "one")
    child = os.fork()
    if child == 0:

        def write(folder: str) -> None:
            Path(folder, "part").write_text("two")
            os.kill(os.getpid(), signal.SIGKILL)

        commit_folder(tmp_path / "x", write, b"two", LAYOUT, ranks_of())
    os.waitpid(child, 0)
    assert found(tmp_path / "x") == {"part": "one", "done": "one"}
    assert len(os.listdir(tmp_path)) == 2
    save(tmp_path / "x", "three")
    assert (found(tmp_path / "x")["part"], os.listdir(tmp_path)) == ("three", ["x"])


def commit_together(path: str, failing: int | None) -> str:
    ranks = ranks_of()

    def write(folder: str) -> None:
        if ranks.rank == failing:
            raise PermissionError(errno.EACCES, "not here", folder)
        Path(folder, f"part{ranks.rank}").write_text(str(ranks.rank))

    try:
        commit_folder(path if ranks.rank == 0 else "ignored", write, b"all", LAYOUT, ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_all_ranks_write_one_folder(tmp_path: Path, workers: Any) -> None:
    assert workers(2).run(commit_together, str(tmp_path / "x"), None) == ["", ""]
    assert found(tmp_path / "x") == {"part0": "0", "part1": "1", "done": "all"}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all(failing: int, tmp_path: Path, workers: Any) -> None:
    errors = workers(2).run(commit_together, str(tmp_path / "x"), failing)
    assert all(error.startswith("PermissionError") for error in errors)
    assert f"(on rank {failing})" in errors[1 - failing]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises((PermissionError, CheckpointError)):
        save(tmp_path / "x", "one")
