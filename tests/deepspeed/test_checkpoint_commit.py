"""A save in DeepSpeed's layout that fails or dies leaves what was there before."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import STAGES, apart, launched, message, run, set_up, train, whole

from fabric_core import Fabric


class Large(torch.nn.Linear):
    """Files of some 100 kB."""

    def __init__(self) -> None:
        super().__init__(6, 4000)


def failing_save(folder: str, stage: int, failing: int | None, limit: int) -> dict[str, Any]:
    """A good save; then one in which a rank may write no large file, or the disk is too small."""
    fabric = launched(stage)
    module = Large()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters()))
    train(fabric, model, optimizer, 0, 1)
    if limit:
        fabric.save(folder, {"model": model, "optimizer": optimizer, "step": 1})
    weights = whole(fabric, model)
    train(fabric, model, optimizer, 1, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fabric.global_rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        text = message(fabric.save, folder, {"model": model, "optimizer": optimizer, "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    same = None
    if limit:
        fabric.load(folder, state)
        same = apart(weights, whole(fabric, model))
    fabric.teardown()
    return {"text": text, "step": state["step"], "same": same}


@pytest.mark.parametrize("stage", [0, *STAGES])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_fails_all(stage: int, failing: int, tmp_path: Path, workers: Any) -> None:
    if stage == 0 and failing == 1:
        pytest.skip("rank 1 writes nothing then")
    results = run(workers(2), failing_save, str(tmp_path / "ck"), stage, failing, 20_000)
    assert results[failing]["text"].startswith("OSError: [Errno 27] File too large")
    assert f"File too large (on rank {failing})" in results[1 - failing]["text"]
    assert [(result["step"], result["same"]) for result in results] == [(1, 0), (1, 0)]
    assert os.listdir(tmp_path) == ["ck"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_full_disk(stage: int, small_disk: Path, workers: Any) -> None:
    results = run(workers(2), failing_save, str(small_disk / "ck"), stage, None, 0)
    assert all("No space left on device" in result["text"] for result in results)
    assert os.listdir(small_disk) == []


def over_what_is_there(folder: str) -> list[str]:
    fabric = launched(2)
    model, optimizer = set_up(fabric)
    state = {"model": model, "optimizer": optimizer}
    texts = [message(fabric.save, f"{folder}/{name}", state) for name in ("ck", "file", "foreign", "sharded")]
    fabric.teardown()
    return texts


def test_what_is_replaced_and_what_is_not(tmp_path: Path, workers: Any) -> None:
    from fabric_core.checkpoint.sharded import ranks_of, write_sharded

    (tmp_path / "file").write_text("a single file, as of another strategy")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    write_sharded(tmp_path / "sharded", {"model": {"w": torch.ones(2)}}, {}, ranks_of(None))
    for texts in (
        run(workers(2), over_what_is_there, str(tmp_path)),
        run(workers(2), over_what_is_there, str(tmp_path)),
    ):
        for first, file, foreign, sharded in texts:
            assert first == file == sharded == "nothing was raised"
            assert foreign.startswith("IsADirectoryError")
            assert "holds other things than a checkpoint" in foreign
        for name in ("ck", "file"):
            (tmp_path / name / "notes.txt").write_text("mine")  # stays in the second round
    for name in ("ck", "file", "foreign"):
        assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["ck", "file", "foreign", "sharded"]
    assert Fabric(accelerator="cpu", devices=1).load(tmp_path / "ck").keys() == {"model", "optimizer"}


def test_other_tags_in_the_folder_stay(tmp_path: Path, workers: Any) -> None:
    run(workers(2), over_what_is_there, str(tmp_path))
    (tmp_path / "ck" / "global_step5").mkdir()
    run(workers(2), over_what_is_there, str(tmp_path))
    assert (tmp_path / "ck" / "global_step5").is_dir()
    assert (tmp_path / "ck" / "latest").read_text() == "checkpoint"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has torch loaded")
MANY = pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])


@linux
@pytest.mark.parametrize("kills", [2, MANY])
def test_a_killed_save_leaves_the_old_or_the_new_one(kills: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_deepspeed_save.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "checkpoints", str(kills), str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop("old") + counts.pop("new") == kills, done.stdout
    assert counts.pop("left behind") <= kills
    assert counts == {"left behind after the next save": 0, "slow survivors": 0}


def saved_in_turn(path: str, kinds: list[Any]) -> list[list[str]]:
    """One path, saved to under one strategy after the other; what is there each time."""
    found = []
    for step, how in enumerate(kinds):
        fabric = launched(how)
        model, optimizer = set_up(fabric)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
        if step:
            fabric.load(path, state)
            assert state["step"] == step
        fabric.save(path, {**state, "step": step + 1})
        fabric.barrier()
        found.append(sorted(os.listdir(path)) if os.path.isdir(path) else [])
        fabric.barrier()
        fabric.teardown()
    return found


def test_every_strategy_saves_to_the_path_that_it_has_loaded_from(tmp_path: Path, workers: Any) -> None:
    found = run(workers(2), saved_in_turn, str(tmp_path / "ck"), ["ddp", 2, "ddp", 3, "fsdp", 1, "fsdp"])[0]
    folders = [content[0] if content else None for content in found]
    assert folders == [None, "checkpoint", None, "checkpoint", ".metadata", "checkpoint", ".metadata"]
    assert os.listdir(tmp_path) == ["ck"]
    assert "latest" not in found[-1]
