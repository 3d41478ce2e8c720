"""A full file in the place of a sharded checkpoint: no file of the user goes, and nothing else is left."""

import errno
import os

import pytest
import torch

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.checkpoint.sharded import is_sharded, publication, ranks_of, write_sharded
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.strategies.sharded.checkpoints import _write_full


def save_folder(path):
    write_sharded(path, {"model": {"w": torch.ones(3)}}, {"step": 1}, ranks_of())


def save_file(path, io=None):
    _write_full(io or TorchCheckpointIO(), path, {"step": 2}, None)


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture(params=["exchanged", "renamed in turn"], autouse=True)
def way(request, monkeypatch):
    if request.param != "exchanged":
        monkeypatch.setattr(publication, "exchange", lambda first, second: False)


def test_a_folder_with_other_things_is_refused_and_they_are_named(tmp_path):
    save_folder(tmp_path / "ck")
    (tmp_path / "ck" / "logs").mkdir()
    (tmp_path / "ck" / "logs" / "metrics.csv").write_text("mine")
    before = names(tmp_path / "ck")
    with pytest.raises(IsADirectoryError, match="also holds 'logs'"):
        save_file(tmp_path / "ck")
    assert (names(tmp_path), names(tmp_path / "ck")) == (["ck"], before)
    assert (tmp_path / "ck" / "logs" / "metrics.csv").read_text() == "mine"


class Meanwhile(TorchCheckpointIO):
    """Somebody else does something while the file is being written."""

    def __init__(self, action):
        self.action = action

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path)
        self.action()


def test_what_somebody_puts_there_meanwhile_is_refused_too(tmp_path):
    save_folder(tmp_path / "ck")
    with pytest.raises(IsADirectoryError, match=r"also holds 'notes\.txt'"):
        save_file(tmp_path / "ck", Meanwhile((tmp_path / "ck" / "notes.txt").touch))
    assert is_sharded(tmp_path / "ck")
    assert names(tmp_path) == ["ck"]


def test_another_save_leaves_a_file_that_is_being_written_alone(tmp_path):
    save_folder(tmp_path / "ck")
    save_file(tmp_path / "ck", Meanwhile(lambda: save_folder(tmp_path / "ck")))
    assert torch.load(tmp_path / "ck") == {"step": 2}
    assert names(tmp_path) == ["ck"]


def test_the_disk_has_the_new_name_before_the_old_checkpoint_goes(tmp_path, monkeypatch):
    save_folder(tmp_path / "ck")
    synced = []

    def sync(folder):
        inside = next((path for path, _, files in os.walk(folder) if "__0_0.distcp" in files), None)
        synced.append((folder, inside is not None))

    monkeypatch.setattr(publication, "folder_to_disk", sync)
    save_file(tmp_path / "ck")
    assert synced == [(str(tmp_path), True)]
    assert names(tmp_path) == ["ck"]


def test_a_file_that_is_not_written_leaves_the_folder(tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "full")

    save_folder(tmp_path / "ck")
    with pytest.raises(OSError, match="full"):
        save_file(tmp_path / "ck", Meanwhile(fail))
    assert is_sharded(tmp_path / "ck")
    assert names(tmp_path) == ["ck"]


@pytest.mark.parametrize("there", [False, True])
def test_what_was_moved_aside_does_not_come_back_once_the_file_is_gone(there, tmp_path):
    save_folder(tmp_path / ".ck.0123456789abcdef.previous")
    if there:
        torch.save({"step": 1}, tmp_path / "ck")
    save_file(tmp_path / "ck")
    assert torch.load(tmp_path / "ck") == {"step": 2}
    assert names(tmp_path) == ["ck"]
    (tmp_path / "ck").unlink()
    assert not is_sharded(tmp_path / "ck")


class FolderIO(CheckpointIO):
    """Writes a folder, not a file, and leaves things beside it."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        os.mkdir(path)
        for place in (os.path.join(path, "x"), f"{path}.log"):
            with open(place, "w") as file:
                file.write(repr(checkpoint))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        raise NotImplementedError

    def remove_checkpoint(self, path):
        raise NotImplementedError


def test_an_io_may_write_what_it_likes(tmp_path):
    save_folder(tmp_path / "ck.io")
    save_file(tmp_path / "ck.io", FolderIO())
    assert names(tmp_path) == ["ck.io"]
    assert (tmp_path / "ck.io" / "x").read_text() == "{'step': 2}"
