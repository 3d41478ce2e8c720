"""Saving in the background: what is written, when an error shows, and what there is when the process ends."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.abc import CheckpointIO
from fabric_core.checkpoint.async_io import AsyncCheckpointIO, background_group
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.errors import CheckpointError


class Gated(TorchCheckpointIO):
    """Writes when it is told to."""

    def __init__(self):
        self.go, self.begun, self.threads = threading.Event(), threading.Event(), []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.threads.append(threading.current_thread())
        self.begun.set()
        assert self.go.wait(30)
        super().save_checkpoint(checkpoint, path, storage_options)


class Failing(TorchCheckpointIO):
    """Fails to write what is called so."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if "bad" in str(path):
            raise OSError(28, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


class Least(CheckpointIO):
    """No more than the contract asks for, and fewer arguments."""

    def __init__(self):
        self.stored = {}

    def save_checkpoint(self, checkpoint, path):
        self.stored[path] = checkpoint

    def load_checkpoint(self, path):
        return self.stored[path]

    def remove_checkpoint(self, path):
        del self.stored[path]


@pytest.fixture
def gated():
    io = AsyncCheckpointIO(Gated())
    yield io
    io.checkpoint_io.go.set()
    io.teardown()


@pytest.fixture
def failing():
    return AsyncCheckpointIO(Failing())


def test_what_changes_after_the_save_does_not_show(gated, tmp_path):
    state = {"w": torch.zeros(3), "steps": [1]}
    gated.save_checkpoint(state, tmp_path / "a.ckpt")
    state["w"].fill_(7)
    state["steps"].append(2)
    assert not (tmp_path / "a.ckpt").exists()
    gated.checkpoint_io.go.set()
    gated.drain()
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert (loaded["w"].tolist(), loaded["steps"]) == ([0, 0, 0], [1])
    assert gated.checkpoint_io.threads[0] is not threading.current_thread()


def test_the_next_save_waits_for_the_one_in_flight(gated, tmp_path):
    gated.save_checkpoint({"n": 1}, tmp_path / "1.ckpt")
    gated.checkpoint_io.begun.wait(30)
    threading.Timer(0.2, gated.checkpoint_io.go.set).start()
    gated.save_checkpoint({"n": 2}, tmp_path / "2.ckpt")
    assert (tmp_path / "1.ckpt").exists()
    assert gated.blocked_seconds > 0.1
    gated.drain()
    assert gated.load_checkpoint(tmp_path / "2.ckpt") == {"n": 2}


def test_the_time_that_a_save_blocks_is_reported(tmp_path, caplog):
    io, times = AsyncCheckpointIO(), []
    with caplog.at_level(logging.DEBUG, logger="fabric_core"):
        for name in ("a", "b"):
            io.save_checkpoint({"w": torch.ones(1000)}, tmp_path / name)
            times.append(io.blocked_seconds)
    assert min(times) > 0
    assert io.total_blocked_seconds == sum(times)
    assert [str(tmp_path / "a") in caplog.messages[0], len(caplog.messages)] == [True, 2]
    assert "blocked for" in caplog.text


def test_the_memory_of_the_copy_is_used_again(tmp_path):
    io = AsyncCheckpointIO()
    state = {"w": torch.ones(100)}
    addresses = {io.stage(state)["w"].data_ptr() for _ in range(3)}
    assert len(addresses) == 1
    io.teardown()
    assert io._buffers._kept == {}


WAYS = {
    "save": lambda io, folder: io.save_checkpoint({"a": 1}, folder / "good.ckpt"),
    "stage": lambda io, folder: io.stage({"a": 1}),
    "submit": lambda io, folder: io.submit(lambda: (folder / "good.ckpt").touch(), folder / "good.ckpt"),
    "drain": lambda io, folder: io.drain(),
    "load": lambda io, folder: io.load_checkpoint(folder / "old.ckpt"),
    "open": lambda io, folder: io.open_checkpoint(folder / "old.ckpt").__enter__(),
    "remove": lambda io, folder: io.remove_checkpoint(folder / "old.ckpt"),
    "teardown": lambda io, folder: io.teardown(),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_is_raised_once_by_whatever_comes_next(way, failing, tmp_path):
    torch.save({"a": 0}, tmp_path / "old.ckpt")
    failing.save_checkpoint({"a": 1}, tmp_path / "bad.ckpt")
    with pytest.raises(OSError, match="No space left") as info:
        WAYS[way](failing, tmp_path)
    if sys.version_info >= (3, 11):
        assert (
            f"Writing the checkpoint {str(tmp_path / 'bad.ckpt')!r} in the background failed" in info.value.__notes__[0]
        )
    failing.drain()
    assert {path.name for path in tmp_path.iterdir()} == {"old.ckpt"}


def test_after_an_error_saving_works_again(failing, tmp_path):
    failing.save_checkpoint({"a": 1}, tmp_path / "bad.ckpt")
    with pytest.raises(OSError, match="No space"):
        failing.save_checkpoint({"a": 2}, tmp_path / "good.ckpt")
    failing.save_checkpoint({"a": 3}, tmp_path / "good.ckpt")
    assert failing.load_checkpoint(tmp_path / "good.ckpt") == {"a": 3}


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    io = AsyncCheckpointIO()
    with pytest.raises(CheckpointError, match="cannot be copied"):
        io.save_checkpoint({"f": lambda: 0}, tmp_path / "a.ckpt")
    io.drain()
    assert list(tmp_path.iterdir()) == []


def test_loading_and_removing_come_after_the_save_in_flight(tmp_path):
    io = AsyncCheckpointIO()
    for value in range(3):
        io.save_checkpoint({"w": torch.full((2**18,), value)}, tmp_path / "a.ckpt")
        with io.open_checkpoint(tmp_path / "a.ckpt") as opened:
            assert opened.content["w"].unique().tolist() == [value]
        io.save_checkpoint({"w": torch.full((2**18,), -value)}, tmp_path / "a.ckpt")
        assert io.load_checkpoint(tmp_path / "a.ckpt")["w"].unique().tolist() == [-value]
    io.save_checkpoint({"w": torch.ones(2**18)}, tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_it_goes_over_any_other_io():
    io = AsyncCheckpointIO(Least())
    io.save_checkpoint({"w": torch.ones(2)}, "key")
    assert io.load_checkpoint("key", map_location="cpu", weights_only=True)["w"].tolist() == [1, 1]
    with io.open_checkpoint("key") as opened:
        assert opened.content["w"].tolist() == [1, 1]
    io.remove_checkpoint("key")
    assert io.checkpoint_io.stored == {}


@pytest.mark.parametrize("inner", [AsyncCheckpointIO(), TorchCheckpointIO, "torch"])
def test_what_it_cannot_go_over_is_refused(inner):
    with pytest.raises(TypeError, match="expected a CheckpointIO that writes in the foreground"):
        AsyncCheckpointIO(inner)


def test_it_travels_to_another_process_without_its_thread_and_memory(tmp_path):
    io = AsyncCheckpointIO(Failing())
    io.save_checkpoint({"w": torch.ones(100)}, tmp_path / "a.ckpt")
    copy = pickle.loads(pickle.dumps(io))
    assert type(copy.checkpoint_io) is Failing
    assert (copy.total_blocked_seconds, copy._buffers._kept) == (0.0, {})
    io.drain()


def test_a_forked_process_does_not_wait_for_its_parents_save(gated, tmp_path):
    gated.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    if (child := os.fork()) == 0:
        gated.drain()
        os._exit(7)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_a_lone_process_has_no_group_for_the_background():
    assert background_group() is None


def test_a_training_goes_on_while_its_checkpoint_is_written(tmp_path):
    io = AsyncCheckpointIO(Gated())
    fabric = Fabric(accelerator="cpu", devices=1, checkpoint_io=io)
    module = nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.1))
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 0})
    before = model.weight.tolist()
    for _ in range(3):
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
    io.checkpoint_io.go.set()
    assert model.weight.tolist() != before
    fabric.load(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
    assert model.weight.tolist() == before
    assert optimizer.state_dict()["state"] == {}


def test_teardown_finishes_the_save_and_raises_its_error(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, checkpoint_io=AsyncCheckpointIO(Failing()))
    fabric.save(tmp_path / "a.ckpt", {"step": 1})
    fabric.teardown()
    assert (tmp_path / "a.ckpt").exists()
    fabric.save(tmp_path / "bad.ckpt", {"step": 1})
    with pytest.raises(OSError, match="No space"):
        fabric.teardown()


def test_kill_9_while_writing_leaves_the_old_or_the_new(tmp_path):
    script, path, size = Path(__file__).with_name("kill_async_save.py"), tmp_path / "a.ckpt", 2**22
    torch.save({"w": torch.full((size,), 0.0)}, path)
    kept = 0.0
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, script, path, str(attempt + 1), str(size)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.012 * attempt)
        process.kill()
        process.communicate()
        values = torch.load(path, weights_only=True)["w"].unique().tolist()
        assert values in ([kept], [attempt + 1])
        kept = values[0]
