"""The language model under DeepSpeed, from wheels: the losses of ddp, and checkpoints that go anywhere.

The example knows nothing of DeepSpeed; the strategy is typed at ``fabric run``.
"""

from __future__ import annotations

import inspect
import itertools
import json
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.wheel_environment import Environment

pytestmark = pytest.mark.timeout(900)  # the first run may build native parts
pytest.importorskip("deepspeed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model"
TINY = shlex.split(
    "--steps 30 --batch-size 8 --block-size 16 --layers 2 --heads 2 --dim 32 --lr 1e-2"
    " --eval-every 10 --eval-batches 2 --checkpoint-every 0"
)
STAGES = ("1", "2", "3")
SPREAD = 1e-5  # nats per byte after 30 steps: float32 sums in another order, amplified by training
BF16_SPREAD = 0.02  # the same for bfloat16: DeepSpeed casts the parameters, ddp autocasts; 0.003 is usual
slow = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """The example in two processes, with a folder of its own in which checkpoint and losses go."""

    environment: Environment
    text: Path
    out: Path

    def run(self, strategy: str, *options: str, precision: str = "32-true") -> str:
        where = ("--accelerator", "cpu", "--devices", "2", "--strategy", strategy, "--precision", precision)
        files = ("--data", str(self.text), "--out", str(self.out))
        done = self.environment.fabric("run", *where, str(EXAMPLE / "train.py"), *TINY, *files, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def checkpoint(self) -> Path:
        return self.out / "model.ckpt"

    @property
    def losses(self) -> list[float]:
        """Of each step, then of each validation."""
        curves = json.loads((self.out / "losses.json").read_text())
        return [loss for name in ("train", "validation") for _, loss in curves[name]]

    def copy(self, out: Path) -> Job:
        shutil.copytree(self.out, out)
        return Job(self.environment, self.text, out)


Finished = Callable[..., tuple[Job, str]]


@pytest.fixture(scope="session")
def fresh(backends: Environment, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Job]:
    """Makes jobs."""
    text = tmp_path_factory.mktemp("text")
    for module in (inspect, subprocess, socket):
        shutil.copy(module.__file__, text)
    return lambda: Job(backends, text, tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def finished(fresh: Callable[[], Job]) -> Finished:
    """Finished jobs by strategy and precision, each run once."""
    made: dict[tuple[str, ...], tuple[Job, str]] = {}

    def run(strategy: str, precision: str = "32-true", *options: str) -> tuple[Job, str]:
        key = (strategy, precision, *options)
        if key not in made:
            job = fresh()
            made[key] = job, job.run(strategy, *options, precision=precision)
        return made[key]

    return run


@pytest.fixture(scope="session")
def stopped(finished: Finished) -> Callable[[str], Job]:
    """Jobs by stage that were stopped after 13 of the 30 steps."""
    return lambda stage: finished(f"deepspeed_stage_{stage}", "32-true", "--stop-after", "13")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_ddp(finished: Finished, stage: str) -> None:
    (job, output), (reference, _) = finished(f"deepspeed_stage_{stage}"), finished("ddp")
    assert "processes: 2\n" in output
    assert job.losses == pytest.approx(reference.losses, abs=SPREAD)
    assert job.losses[29] < job.losses[0] - 1.5


@pytest.mark.parametrize("stage", [pytest.param("1", marks=slow), "2", pytest.param("3", marks=slow)])
def test_in_bfloat16_too(finished: Finished, stage: str) -> None:
    job, _ = finished(f"deepspeed_stage_{stage}", "bf16-mixed")
    assert job.losses == pytest.approx(finished("ddp", "bf16-mixed")[0].losses, abs=BF16_SPREAD)
    assert job.losses != finished("ddp")[0].losses


@pytest.mark.parametrize("stage", [pytest.param("1", marks=slow), "2", pytest.param("3", marks=slow)])
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(
    finished: Finished, stopped: Callable[[str], Job], tmp_path: Path, stage: str
) -> None:
    job = stopped(stage).copy(tmp_path / "resumed")
    assert len(job.losses) == 13 + 2
    job.run(f"deepspeed_stage_{stage}", "--resume")
    assert job.losses == finished(f"deepspeed_stage_{stage}")[0].losses


CHANGES = [
    pytest.param(before, after, marks=() if (before, after) == ("2", "3") else slow)
    for before, after in itertools.permutations(STAGES, 2)
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_it_goes_on_at_another_stage(
    finished: Finished, stopped: Callable[[str], Job], tmp_path: Path, before: str, after: str
) -> None:
    job = stopped(before).copy(tmp_path / "resumed")
    job.run(f"deepspeed_stage_{after}", "--resume")
    assert job.losses == pytest.approx(finished(f"deepspeed_stage_{after}")[0].losses, abs=SPREAD)


@slow
@pytest.mark.parametrize("strategy", [*(f"deepspeed_stage_{stage}" for stage in STAGES), "deepspeed_stage_2_offload"])
def test_accumulated_gradients_are_those_of_ddp(finished: Finished, strategy: str) -> None:
    job, _ = finished(strategy, "32-true", "--accumulate", "2")
    assert job.losses == pytest.approx(finished("ddp")[0].losses, abs=SPREAD)


@slow
@pytest.mark.parametrize("preset", ["stage_1_offload", "stage_2_offload", "stage_3_offload"])
def test_offloaded_it_learns_the_same(finished: Finished, preset: str) -> None:
    job, _ = finished(f"deepspeed_{preset}")
    assert job.losses == pytest.approx(finished("ddp")[0].losses, abs=SPREAD)


LOAD_PLAIN = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig
checkpoint = torch.load(sys.argv[2])
model = GPT(GPTConfig(**checkpoint["config"])).eval()
model.load_state_dict(checkpoint["model"])
torch.manual_seed(0)
tokens = model.generate(torch.tensor([list(b"def ")]), 400)
print(bytes(tokens[0].tolist()).decode(errors="replace"))
"""


@pytest.mark.parametrize("stage", [pytest.param("1", marks=slow), pytest.param("2", marks=slow), "3"])
def test_consolidated_a_plain_model_writes_the_same_text(
    finished: Finished, backends: Environment, tmp_path: Path, stage: str
) -> None:
    job, output = finished(f"deepspeed_stage_{stage}")
    target = tmp_path / "plain.ckpt"
    done = backends.fabric("checkpoint", "consolidate", str(job.checkpoint), "--output", str(target))
    assert done.returncode == 0, done.stderr
    written = backends.run("-c", LOAD_PLAIN, str(EXAMPLE), str(target))
    assert len(written.stdout) > 300
    assert f"\n{written.stdout}" in output


@pytest.mark.parametrize("stage", [pytest.param("1", marks=slow), pytest.param("2", marks=slow), "3"])
def test_one_process_without_deepspeed_reads_the_folder(finished: Finished, backends: Environment, stage: str) -> None:
    job, _ = finished(f"deepspeed_stage_{stage}")
    options = ["--checkpoint", str(job.checkpoint), "--prompt", "import ", "--length", "20"]
    written = backends.run(str(EXAMPLE / "generate.py"), *options)
    assert written.stdout.startswith("import "), written.stderr
