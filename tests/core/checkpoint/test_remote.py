"""An object in a store is there completely, or what was there before still is."""

import importlib
import uuid

import fsspec
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from fabric_core.checkpoint.commit import publish
from fabric_core.checkpoint.torch_io import TorchCheckpointIO


class PlainStore(DirFileSystem):
    """A store on a local folder that knows nothing of transactions: what is written is there at once."""

    protocol = "plainstore"
    root = ""

    def __init__(self, **kwargs):
        super().__init__(path=self.root, fs=LocalFileSystem(), **kwargs)

    def open(self, path, mode="rb", **kwargs):
        return open(self._join(self._strip_protocol(path)), mode)


@pytest.fixture(params=["memory", "plainstore"])
def url(request, tmp_path):
    if request.param == "memory":
        yield f"memory://{uuid.uuid4().hex}/x.ckpt"
        return
    fsspec.register_implementation("plainstore", PlainStore, clobber=True)
    PlainStore.root = str(tmp_path)
    PlainStore.clear_instance_cache()
    yield "plainstore://folder/x.ckpt"
    importlib.import_module("fsspec.registry")._registry.pop("plainstore")


def fail_halfway(url):
    with publish(url) as file:
        file.write(b"half")
        raise ZeroDivisionError


def files(url):
    filesystem, path = fsspec.core.url_to_fs(url)
    return [name.rpartition("/")[2] for name in filesystem.find(path.rpartition("/")[0])]


def test_what_is_saved_comes_back(url):
    io = TorchCheckpointIO()
    io.save_checkpoint({"w": torch.arange(5), "epoch": 3}, url)
    assert files(url) == ["x.ckpt"]
    loaded = io.load_checkpoint(url)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["w"], torch.arange(5))


def test_an_error_leaves_the_old_object_and_no_other(url):
    with publish(url) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError):
        fail_halfway(url)
    assert files(url) == ["x.ckpt"]
    with fsspec.open(url) as file:
        assert file.read() == b"old"


def test_an_error_at_the_first_save_leaves_nothing(url):
    with pytest.raises(ZeroDivisionError):
        fail_halfway(url)
    assert files(url) == []


def test_others_can_write_while_an_object_is_held_back():
    here, there = (f"memory://{uuid.uuid4().hex}/x" for _ in range(2))
    with publish(here):
        with fsspec.open(there, "wb") as file:
            file.write(b"now")
        with fsspec.open(there) as file:
            assert file.read() == b"now"


def test_missing_and_removed(url):
    io = TorchCheckpointIO()
    io.remove_checkpoint(url)
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(url)
    io.save_checkpoint({}, url)
    io.remove_checkpoint(url)
    assert files(url) == []


def test_a_file_url_is_written_as_a_local_file(tmp_path):
    io = TorchCheckpointIO()
    io.save_checkpoint({"epoch": 1}, f"file://{tmp_path}/x")
    assert torch.load(tmp_path / "x") == {"epoch": 1}
    assert io.load_checkpoint(f"file://{tmp_path}/x") == {"epoch": 1}
