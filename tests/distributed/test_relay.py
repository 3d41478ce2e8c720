"""A checkpoint that rank 0 reads for all: what fails on one rank ends on all of them, and nobody waits for the rest."""

import argparse
import os
import warnings
from pathlib import Path

import torch

from distributed.sharded_network import launched, message, same, set_up
from distributed.small_model import needs_fsdp
from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.opening import opened
from fabric_core.checkpoint.relay import RelayedCheckpoint
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.torch_io import TorchCheckpointIO

pytestmark = needs_fsdp
PATIENCE = 60  # seconds; a rank that waits in vain does so for half an hour


def unsafe_folder_of_rank_zero(folder):
    fabric = launched()
    model, optimizer = set_up(fabric, steps=1)
    optimizer.optimizer.param_groups[0]["note"] = argparse.Namespace(lr=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This checkpoint will be refused by safe loading")
        fabric.save(folder / "x", {"model": model, "optimizer": optimizer})
    (folder / "elsewhere").mkdir(exist_ok=True)
    loading = launched(strategy="ddp")
    other, its_optimizer = set_up(loading, seed=1)
    state = {"model": other, "optimizer": its_optimizer}
    before = Path.cwd()
    os.chdir(folder if fabric.global_rank == 0 else folder / "elsewhere")
    try:
        texts = [message(loading.load, "x", state), message(loading.load, "x")]
        loading.load("x", state, weights_only=False)  # all ranks are in step
    finally:
        os.chdir(before)
    assert its_optimizer.optimizer.param_groups[0]["note"].lr == 1
    return texts


def test_a_value_that_only_rank_zero_can_refuse_is_refused_by_all(tmp_path, workers):
    first, second = workers(2).run(unsafe_folder_of_rank_zero, tmp_path, timeout=PATIENCE)
    for here, there in zip(first, second, strict=True):
        assert here.startswith("UnsafeCheckpointError")
        assert "argparse.Namespace" in here
        assert there.startswith(
            "UnsafeCheckpointError: The checkpoint, which rank 0 reads for all ranks, was not loaded"
        )
        assert "because rank 0 cannot: UnsafeCheckpointError" in there
        assert "argparse.Namespace" in there


class OfFunctions(CheckpointIO):
    """Reads what no other process can be sent."""

    def save_checkpoint(self, checkpoint, path):
        raise NotImplementedError

    def load_checkpoint(self, path):
        return {"function": lambda: 0}

    def remove_checkpoint(self, path):
        raise NotImplementedError


def content_that_cannot_be_sent(path):
    fabric = launched(plugins=[OfFunctions()])
    return message(fabric.load, path), fabric.broadcast("in step")


def test_content_that_cannot_be_sent_fails_on_all_ranks(tmp_path, workers):
    (here, one), (there, other) = workers(2).run(content_that_cannot_be_sent, tmp_path / "x", timeout=PATIENCE)
    assert "pickle" in here.lower()
    assert f"because rank 0 cannot: {here}" in there
    assert one == other == "in step"


class Broken(OpenCheckpoint):
    """Fails at the second tensor."""

    def read(self, pairs):
        if pairs[0][0].numel() == 4:
            raise OSError("the disk is gone")
        super().read(pairs)


def one_rank_fails():
    launched()
    ranks = ranks_of()
    plain = {"a": torch.arange(6.0), "b": torch.arange(4.0), "c": torch.arange(3), "empty": torch.ones(0, 2)}
    noted = torch.ones(3)
    noted.note = "no plain tensor, so it comes with the structure"
    content = {**plain, "noted": noted}
    source = RelayedCheckpoint(OpenCheckpoint(content) if ranks.rank == 0 else None, ranks)
    windows = source.content
    bad = 2 if ranks.rank == 1 else 3
    texts = [
        message(source.read, [(windows["a"], torch.empty(6)), (windows["c"], torch.empty(bad))]),
        message(source.read, [(windows["noted"], torch.zeros(bad)), (windows["b"], torch.empty(4))]),
    ]
    assert same(source.own(dict(windows, noted=None)), {**plain, "noted": None})  # all ranks are in step
    broken = RelayedCheckpoint(Broken(plain) if ranks.rank == 0 else None, ranks)
    texts.append(message(broken.own, broken.content))
    return texts


def test_a_rank_that_cannot_take_or_give_a_tensor_stops_all(workers):
    first, second = workers(2).run(one_rank_fails, timeout=PATIENCE)
    for here, there in [(second[0], first[0]), (second[1], first[1])]:
        assert here.startswith("RuntimeError")
        assert f"because rank 1 cannot: {here}" in there
    assert first[2] == "OSError: the disk is gone"
    assert "because rank 0 cannot: OSError: the disk is gone" in second[2]


def looking(path):
    fabric = launched()
    wrong = "x\0y" if fabric.global_rank == 1 else path

    def look():
        with opened(TorchCheckpointIO(), wrong, None, ranks_of()):
            pass

    return message(look), fabric.broadcast("in step")


def test_a_rank_that_cannot_look_for_the_checkpoint_stops_all(tmp_path, workers):
    torch.save({"a": 1}, tmp_path / "x")
    (there, one), (here, other) = workers(2).run(looking, str(tmp_path / "x"), timeout=PATIENCE)
    assert here.startswith("ValueError")
    assert f"was not opened, because rank 1 cannot: {here}" in there
    assert one == other == "in step"
