"""The tensor-parallel example learns the same on any split, and goes on from another split's checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "examples" / "tensor_parallel" / "train.py"
SMALL = ("--accelerator", "cpu", "--batch-size", "16", "--dim", "32", "--report-every", "4")
SPREAD = 2e-5  # nats: float32 sums in another order, and every line shows six digits


def train(checkpoint: Path, tensor: int, data: int, *options: str, steps: int = 12) -> dict[int, float]:
    """Loss by step."""
    split = ("--tensor-parallel", str(tensor), "--data-parallel", str(data))
    command = [sys.executable, str(TRAIN), *SMALL, *split, "--steps", str(steps), "--checkpoint", str(checkpoint)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "FABRIC_"))}
    done = subprocess.run(
        [*command, *options],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "come out right" in done.stdout
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+): loss ([\d.]+)", done.stdout)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return train(tmp_path_factory.mktemp("whole") / "checkpoint", 1, 1)


def test_the_loss_falls(whole: dict[int, float]) -> None:
    assert list(whole) == [4, 8, 12]
    assert whole[12] < whole[4] - 0.05


def test_a_resumed_run_may_be_split_otherwise(tmp_path: Path, whole: dict[int, float]) -> None:
    first = train(tmp_path / "checkpoint", 2, 1, steps=8)
    rest = train(tmp_path / "checkpoint", 1, 2, "--resume")
    assert list(first) == [4, 8]
    assert list(rest) == [12]
    assert first | rest == pytest.approx(whole, abs=SPREAD)


def test_both_ways_at_once_with_the_sequence_split(tmp_path: Path, whole: dict[int, float]) -> None:
    assert train(tmp_path / "checkpoint", 2, 2, "--sequence") == pytest.approx(whole, abs=SPREAD)
