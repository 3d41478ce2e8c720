"""Files are torch's own, opened safely, and errors name the file and what to do."""

import argparse
import functools
import http.server
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.errors import CheckpointError


@pytest.fixture
def io():
    return TorchCheckpointIO()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.ckpt"


def test_a_saved_file_opens_with_plain_torch(io, path):
    io.save_checkpoint({"w": torch.arange(3), "n": 1}, path)
    assert torch.equal(torch.load(path)["w"], torch.arange(3))


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_files_of_plain_torch_open(io, path, new_format):
    torch.save({"w": torch.arange(3)}, path, _use_new_zipfile_serialization=new_format)
    assert torch.equal(io.load_checkpoint(path)["w"], torch.arange(3))
    with io.open_checkpoint(path) as source:
        source.own(source.content)
        assert torch.equal(source.content["w"], torch.arange(3))


def test_storage_options_are_refused(io, path):
    with pytest.raises(TypeError, match=r"has no storage options, got \{'a': 1\}"):
        io.save_checkpoint({}, path, storage_options={"a": 1})
    assert not path.exists()


@pytest.mark.parametrize("load", ["load_checkpoint", "open_checkpoint"])
def test_a_missing_file_is_named(io, path, load):
    with pytest.raises(FileNotFoundError, match=r"x\.ckpt"):
        getattr(io, load)(path).__enter__()


def test_a_folder_is_no_checkpoint_file(io, tmp_path):
    with pytest.raises(IsADirectoryError):
        io.load_checkpoint(tmp_path)
    with pytest.raises(IsADirectoryError):
        io.save_checkpoint({}, tmp_path)


def test_map_location_says_where_tensors_go(io, path):
    io.save_checkpoint({"w": torch.arange(3)}, path)
    assert io.load_checkpoint(path)["w"].device.type == "cpu"
    assert io.load_checkpoint(path, map_location="meta")["w"].device.type == "meta"


def test_objects_that_would_run_code_are_refused_unless_told_otherwise(io, path):
    torch.save({"args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError, match=r"NOT loaded: it holds argparse\.Namespace") as caught:
        io.load_checkpoint(path)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert "weights_only=False" in str(caught.value)
    assert io.load_checkpoint(path, weights_only=False)["args"].lr == 1
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert io.load_checkpoint(path)["args"].lr == 1


@pytest.mark.parametrize("load", ["load_checkpoint", "open_checkpoint"])
@pytest.mark.parametrize("kept", [0, 1, 3, 100, 0.5, 0.99])
def test_a_cut_file_is_damaged_and_named(io, path, kept, load):
    io.save_checkpoint({"w": torch.arange(1000)}, path)
    size = path.stat().st_size
    os.truncate(path, kept if isinstance(kept, int) else int(kept * size))
    with pytest.raises(CheckpointError, match=r"x\.ckpt.*damaged"):
        getattr(io, load)(path).__enter__()


def test_what_cannot_be_pickled_leaves_the_old_file(io, path):
    io.save_checkpoint({"epoch": 1}, path)
    with pytest.raises(CheckpointError, match=r"x\.ckpt.*cannot be written"):
        io.save_checkpoint({"f": lambda: 0}, path)
    assert io.load_checkpoint(path) == {"epoch": 1}
    assert os.listdir(path.parent) == ["x.ckpt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_reported_as_such(io):
    with pytest.raises(OSError, match="No space left on device"):
        io.save_checkpoint({"w": torch.ones(100_000)}, "/dev/full")


def test_removing_files_folders_and_nothing(io, tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    io.save_checkpoint({}, tmp_path / "file")
    for name in ("folder", "file", "nothing"):
        io.remove_checkpoint(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_removing_a_link_to_a_folder_keeps_the_folder(io, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    io.remove_checkpoint(tmp_path / "link")
    assert os.listdir(tmp_path) == ["folder"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_web_address_is_downloaded_and_opened_safely(io, tmp_path):
    io.save_checkpoint({"epoch": 2}, tmp_path / "site" / "x.ckpt")
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    before = torch.hub.get_dir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        torch.hub.set_dir(tmp_path / "hub")
        try:
            assert io.load_checkpoint(f"http://127.0.0.1:{server.server_port}/x.ckpt") == {"epoch": 2}
        finally:
            torch.hub.set_dir(before)
            server.shutdown()


def test_an_open_file_is_closed_again(io, path):
    def open_files():
        return sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else []

    io.save_checkpoint({"w": torch.arange(3)}, path)
    before = open_files()
    with io.open_checkpoint(path):
        pass
    assert open_files() == before
