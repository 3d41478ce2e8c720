"""A sharded checkpoint in a store: one object makes it the checkpoint, at whatever moment the writer dies."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile

from fabric_core.checkpoint.sharded import is_sharded, open_sharded, ranks_of, verify, write_sharded
from fabric_core.errors import CheckpointError

HERE = Path(__file__).parent


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/ck"


def save(url, value=1.0, extras=None):
    write_sharded(url, {"w": torch.full((600, 300), value), "n": [1, 2]}, extras or {"epoch": value}, ranks_of())


def value(url):
    with open_sharded(url) as checkpoint:
        w = torch.empty(600, 300)
        checkpoint.read({"w": w})
        assert checkpoint.read_object("n") == [1, 2]
        assert checkpoint.extras == {"epoch": w[0, 0].item()}
        assert (w == w[0, 0]).all()
        return w[0, 0].item()


def names(url):
    filesystem, path = fsspec.core.url_to_fs(url)
    return sorted(name.rpartition("/")[2] for name in filesystem.find(path))


def test_saving_again_replaces_all(url):
    assert not is_sharded(url)
    for round in (1.0, 2.0):
        save(url, round)
        assert is_sharded(url)
        assert value(url) == round
        assert verify(url) == []
        assert len(names(url)) == 6


def test_plain_readers_find_what_they_look_for(url):
    from fabric_core.checkpoint.sharded.index import read_index

    save(url)
    filesystem, path = fsspec.core.url_to_fs(url)
    index = read_index(filesystem.cat_file(f"{path}/.metadata"), "x")
    assert index.objects["n"].file in names(url)
    assert {"meta.pt", ".metadata", "manifest.json"} < set(names(url))


def test_an_error_leaves_the_old_one_and_nothing_else(url):
    save(url)
    before = names(url)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(url, 2.0, {"bad": lambda: None})
    assert names(url) == before
    assert value(url) == 1.0


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
def test_a_lost_answer_to_the_last_step_costs_no_files(error, arrived, url, monkeypatch):
    save(url)
    commit = MemoryFile.commit

    def lost(file):
        if not file.path.endswith("manifest.json") or arrived:
            commit(file)
        if file.path.endswith("manifest.json"):
            raise error("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "commit", lost)
        with pytest.raises(error, match="no answer"):
            save(url, 2.0)
    assert value(url) == (2.0 if arrived else 1.0)
    save(url, 3.0)
    assert value(url) == 3.0
    assert verify(url) == []
    assert len(names(url)) == 6


def test_files_stay_where_nobody_can_tell_whether_they_are_the_checkpoint(url, monkeypatch):
    commit, cat_file = MemoryFile.commit, type(fsspec.filesystem("memory")).cat_file
    down = []

    def lost(file):
        commit(file)
        if file.path.endswith("manifest.json"):
            down.append(file)
            raise TimeoutError("no answer")

    def unreachable(self, *args, **kwargs):
        if down:
            raise OSError("no connection")
        return cat_file(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "commit", lost)
        patched.setattr(type(fsspec.filesystem("memory")), "cat_file", unreachable)
        with pytest.raises(TimeoutError, match="no answer"):
            save(url, 2.0)
    assert value(url) == 2.0


def test_a_folder_with_other_things_is_refused(url):
    fsspec.core.url_to_fs(url)[0].pipe_file(f"{url}/thesis.tex", b"1")
    with pytest.raises(IsADirectoryError, match="holds other things"):
        save(url)
    assert names(url) == ["thesis.tex"]


def test_other_things_beside_a_checkpoint_survive(url):
    save(url)
    fsspec.core.url_to_fs(url)[0].pipe_file(f"{url}/notes.txt", b"mine")
    save(url, 2.0)
    assert "notes.txt" in names(url)


def test_a_file_in_the_way_is_refused_where_it_excludes_a_folder(url):
    fsspec.core.url_to_fs(url)[0].pipe_file(url, b"1")
    with pytest.raises(FileExistsError, match="Remove the file first"):
        save(url)


def test_files_that_are_gone_are_listed(url):
    save(url)
    lost = next(name for name in names(url) if name.endswith(".distcp"))
    fsspec.core.url_to_fs(url)[0].rm(f"{url}/{lost}")
    with pytest.raises(CheckpointError, match=f"{lost} is missing"), open_sharded(url):
        pass


def test_whenever_the_writer_dies_the_old_or_the_new_one_is_there(tmp_path):
    """A process of its own dies before its first change to the store, then before the second, and so on."""
    done = subprocess.run(
        [sys.executable, HERE / "die_at_every_step.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    steps = len(found)
    assert steps > 10
    assert found == sorted(found), "once the new one is there, it stays"
    assert {"1.0", "2.0"} == set(found)
