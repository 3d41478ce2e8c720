"""The language model learns, resumes exactly, and does the same work however it is launched."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model"
TRAIN = str(EXAMPLE / "train.py")
TINY = shlex.split(
    "--accelerator cpu --steps 30 --batch-size 8 --block-size 16 --layers 2 --heads 2 --dim 32 --lr 1e-2"
)
TINY += shlex.split("--eval-every 10 --eval-batches 2 --checkpoint-every 0")
TWO = ("--devices", "2", "--strategy")
SPREAD = 1e-5  # nats per byte after 30 steps: float32 sums in another order, amplified by training


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    out: Path
    output: str

    @property
    def losses(self) -> dict[str, list[list[float]]]:
        return json.loads((self.out / "losses.json").read_text())

    def curve(self, name: str) -> list[float]:
        return [loss for _, loss in self.losses[name]]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for module in (inspect, subprocess, socket):
        source = Path(module.__file__)
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


def train(out: Path, text: Path, *options: str, program: tuple[str, ...] = (TRAIN,)) -> Run:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "FABRIC_", "PL_"))}
    command = [sys.executable, *program, *TINY, "--data", str(text), "--out", str(out), *options]
    done = subprocess.run(
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return Run(out, done.stdout)


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Run:
    return train(tmp_path_factory.mktemp("one"), text)


@pytest.fixture(scope="session")
def low_precision(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Run:
    return train(tmp_path_factory.mktemp("low"), text, "--precision", "bf16-mixed", "--dropout", "0.1")


def test_the_loss_falls(one_process: Run) -> None:
    train, validation = one_process.curve("train"), one_process.curve("validation")
    assert train[0] > 5
    assert sum(train[-5:]) / 5 < train[0] - 1.5
    assert validation[-1] < validation[0] - 1.5


def test_every_step_and_validation_is_recorded(one_process: Run) -> None:
    assert [step for step, _ in one_process.losses["train"]] == list(range(1, 31))
    assert [step for step, _ in one_process.losses["validation"]] == [0, 10, 20, 30]


def test_the_curve_is_drawn(one_process: Run) -> None:
    pytest.importorskip("matplotlib")
    picture = (one_process.out / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_the_model_writes_at_the_end(one_process: Run) -> None:
    assert "\ndef " in one_process.output


def test_the_checkpoint_can_be_used_to_write(one_process: Run) -> None:
    options = ["--checkpoint", str(one_process.out / "model.ckpt"), "--prompt", "import ", "--length", "20"]
    command = [sys.executable, str(EXAMPLE / "generate.py"), *options]
    assert subprocess.check_output(command, text=True, timeout=60).startswith("import ")


def test_half_precision_learns_too(low_precision: Run, one_process: Run) -> None:
    assert low_precision.curve("train")[-1] < 4
    assert low_precision.curve("train") != one_process.curve("train")


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path: Path, text: Path, low_precision: Run) -> None:
    same = ["--precision", "bf16-mixed", "--dropout", "0.1"]
    stopped = train(tmp_path, text, *same, "--stop-after", "13")
    assert len(stopped.curve("train")) == 13
    resumed = train(tmp_path, text, *same, "--resume")
    assert resumed.losses == low_precision.losses


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


LAUNCHES = {
    "script": ((TRAIN,), (*TWO, "ddp")),
    "accumulating": ((TRAIN,), (*TWO, "ddp", "--accumulate", "2")),
    "spawn": ((TRAIN,), (*TWO, "ddp_spawn")),
    "sharded": ((TRAIN,), (*TWO, "fsdp")),
    "command": (("-m", "fabric_core", "run", "--accelerator", "cpu", *TWO, "ddp", "--main-port", "PORT", TRAIN), ()),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_processes_do_the_work_of_one(launch: str, tmp_path: Path, text: Path, one_process: Run) -> None:
    program, options = LAUNCHES[launch]
    program = tuple(free_port() if word == "PORT" else word for word in program)
    two = train(tmp_path, text, *options, program=program)
    assert "processes: 2\n" in two.output
    for name in ("train", "validation"):
        assert two.curve(name) == pytest.approx(one_process.curve(name), abs=SPREAD)
