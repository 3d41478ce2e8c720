"""The adapters' example learns on a quantised base, and its small file of adapters is all that has to be kept."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

TRAIN = str(Path(__file__).parents[2] / "examples" / "qlora" / "train.py")
TINY = shlex.split(
    "--accelerator cpu --block-size 32 --layers 2 --heads 2 --dim 64 --base-steps 60 --steps 40 --batch-size 8 "
    "--lr 1e-2 --rank 4 --alpha 8 --eval-every 40 --eval-batches 4"
)


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    out: Path
    output: str

    def number(self, pattern: str) -> float:
        [number] = re.findall(pattern, self.output)
        return float(number.replace(",", ""))

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", self.output)]


def train(out: Path, base: Path, *options: str, program: tuple[str, ...] = (TRAIN,)) -> Run:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "FABRIC_", "PL_"))}
    done = subprocess.run(
        [sys.executable, *program, *TINY, "--out", str(out), "--base", str(base), *options],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=out,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return Run(out, done.stdout)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base") / "base.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Run:
    return train(tmp_path_factory.mktemp("run"), base)


def test_the_adapters_lower_the_loss(run: Run) -> None:
    before, after = run.losses
    assert after < before - 0.1


def test_the_linear_layers_shrink_as_4_bits_should(run: Run) -> None:
    # Half a byte per weight, and 4 bytes of scale per 64 weights: 4 / 0.5625 = 7.1; biases stay as they are.
    assert 6.5 < run.number(r"linear layers .* ([\d.]+) times smaller") < 7.2


def test_the_optimizer_keeps_two_bytes_per_parameter(run: Run) -> None:
    count, size = run.number(r"state of ([\d,]+) parameters"), run.number(r"parameters: ([\d,]+) bytes")
    assert 2 * count < size < 2.1 * count + 2 * 256 * 4  # scales per block, and two tables


def test_the_checkpoint_of_the_adapters_is_small_and_enough(run: Run, base: Path) -> None:
    keys = torch.load(run.out / "adapters.ckpt")["model"]
    assert len(keys) == 2 * 2 * 4
    assert all("adapter_" in key for key in keys)
    assert (run.out / "adapters.ckpt").stat().st_size < 0.3 * base.stat().st_size
    assert "with these adapters gives equal outputs" in run.output


@pytest.mark.parametrize("precision", ["bnb-fp4-dq", "bnb-int8"])
def test_other_precisions_learn_too(precision: str, tmp_path: Path, run: Run, base: Path) -> None:
    other = train(tmp_path, base, "--precision", precision)
    assert other.losses[-1] == pytest.approx(run.losses[-1], abs=0.1)
    assert "gives equal outputs" in other.output


def test_fabric_run_starts_two_processes_that_do_the_work_of_one(tmp_path: Path, run: Run, base: Path) -> None:
    start = shlex.split("-m fabric_core run --accelerator cpu --devices 2 --strategy ddp --precision bnb-nf4")
    two = train(tmp_path, base, program=(*start, TRAIN))
    assert two.losses == pytest.approx(run.losses, abs=0.02)
    assert "gives equal outputs" in two.output
