"""Parameters and optimizer state in files: the stage 3 preset for NVMe, on any disk."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from e2e.wheel_environment import Environment

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,  # DeepSpeed's asynchronous input and output takes minutes to build, once
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="needs libaio-dev"),
    pytest.mark.skipif(not find_library("aio"), reason="needs libaio"),
]
WEIGHTS = 1024 * 1024
TRAIN = """
    import argparse, contextlib, json
    from pathlib import Path
    import torch
    from fabric_core import Fabric
    from fabric_deepspeed.presets import stage_3_offload_nvme

    parser = argparse.ArgumentParser()
    parser.add_argument("strategy")
    parser.add_argument("--nvme", default="")
    parser.add_argument("--max-in-cpu", type=int, default=10**9)
    parser.add_argument("--steps", type=int, nargs=2, default=(0, 5))
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--frozen", action="store_true", help="the second layer")
    parser.add_argument("--in-turns", action="store_true", help="only every other step uses the second layer")
    parser.add_argument("--late", action="store_true", help="the model is built before it is known where it goes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1024, 1024, 1])
    parser.add_argument("--in", dest="precision", default="bf16-true")
    args = parser.parse_args()
    on_disk = args.strategy == "nvme"
    strategy = stage_3_offload_nvme(nvme_path=args.nvme, max_in_cpu=args.max_in_cpu) if on_disk else args.strategy
    fabric = Fabric(strategy=strategy, precision=args.precision)
    fabric.launch()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = zip(args.sizes, args.sizes[1:])
            self.layers = torch.nn.ModuleList([torch.nn.Linear(before, after) for before, after in sizes])

        def forward(self, x, step):
            for number, layer in enumerate(self.layers):
                if number != 1 or not args.in_turns or step % 2:
                    x = layer(torch.tanh(x) if number else x)
            return x

    torch.manual_seed(0)
    with contextlib.nullcontext() if args.late else fabric.init_module():
        model = Net()
    model.layers[1].requires_grad_(not args.frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (torch.optim.AdamW if args.strategy == "ddp" else DeepSpeedCPUAdam)(trained, lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if args.load:
        fabric.load(args.load, state)
    losses = []
    for step in range(*args.steps):
        torch.manual_seed(step)
        loss = (model(torch.randn(8, args.sizes[0]), step) - 1).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    files = [path.stat().st_size for path in Path(args.nvme).rglob("*.swp")] if on_disk else []
    if args.save:
        fabric.save(args.save, state | {"step": args.steps[1]})
    weights = fabric.strategy.get_module_state_dict(model)
    if fabric.is_global_zero:
        sums = {key: value.double().sum().item() for key, value in weights.items()}
        print(json.dumps({"losses": losses, "bytes": sum(files), "weights": sums, "loaded": state["step"]}))
"""


@pytest.fixture
def train(backends: Environment, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the program in two processes, with a folder for files of its own, and gives what it printed."""
    program = tmp_path / "train.py"
    program.write_text(textwrap.dedent(TRAIN))

    def run(strategy: str, *arguments: object) -> dict[str, Any]:
        where = ("run", "--accelerator", "cpu", "--devices", "2", str(program), strategy)
        files = ("--nvme", tempfile.mkdtemp(dir=tmp_path)) if strategy == "nvme" else ()
        done = backends.fabric(*where, *files, *map(str, arguments))
        assert done.returncode == 0, done.stdout + done.stderr
        printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return printed

    return run


def test_it_trains_from_files(train: Callable[..., dict[str, Any]]) -> None:
    offloaded, reference = train("nvme"), train("ddp")
    assert offloaded["losses"] == pytest.approx(reference["losses"], rel=0.05)
    assert offloaded["losses"][-1] < offloaded["losses"][0]
    assert offloaded["bytes"] > WEIGHTS * (4 + 4 + 4), "float32 weights and both moments are in files"


@pytest.mark.parametrize("max_in_cpu", [10**9, 0], ids=["parameters in memory", "parameters in files"])
def test_it_goes_on_from_files_exactly(train: Callable[..., dict[str, Any]], tmp_path: Path, max_in_cpu: int) -> None:
    whole = train("nvme", "--max-in-cpu", max_in_cpu)
    first = train("nvme", "--max-in-cpu", max_in_cpu, "--steps", 0, 3, "--save", tmp_path / "ck")
    rest = train("nvme", "--max-in-cpu", max_in_cpu, "--steps", 3, 5, "--load", tmp_path / "ck")
    assert rest["loaded"] == 3
    assert first["losses"] + rest["losses"] == whole["losses"]
    assert rest["weights"] == whole["weights"]


@pytest.mark.parametrize(
    ("before", "after"), [("nvme", "deepspeed_stage_3_offload"), ("deepspeed_stage_3_offload", "nvme")]
)
def test_checkpoints_go_between_files_and_memory(
    train: Callable[..., dict[str, Any]], tmp_path: Path, before: str, after: str
) -> None:
    whole = train(before)
    train(before, "--steps", 0, 3, "--save", tmp_path / "ck")
    rest = train(after, "--steps", 3, 5, "--load", tmp_path / "ck")
    assert rest["losses"] == whole["losses"][3:]
    assert rest["weights"] == whole["weights"]


def test_what_never_stepped_goes_on_from_nothing(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    train("nvme", "--steps", 0, 0, "--save", tmp_path / "ck")
    assert train("nvme", "--load", tmp_path / "ck")["losses"] == train("nvme")["losses"]


ALL_IN_FILES = ("--max-in-cpu", "0")
ODD = ("--sizes", "37", "1023", "1023", "1025", "701", "1")


@pytest.mark.parametrize(
    "options",
    [
        ODD,  # gradients begin anywhere
        (*ODD, *ALL_IN_FILES),
        (*ALL_IN_FILES, "--sizes", "64", "1024", "1024", "1024", "1"),  # a parameter is needed twice soon
        (*ALL_IN_FILES, "--frozen"),
        (*ODD, "--in-turns"),  # parameters without a gradient
        ("--late", "--in", "32-true"),
    ],
    ids=" ".join,
)
def test_files_are_as_good_as_memory(train: Callable[..., dict[str, Any]], options: tuple[str, ...]) -> None:
    in_memory = [one for one in options if one not in ALL_IN_FILES]
    offloaded, reference = train("nvme", *options), train("deepspeed_stage_3_offload", *in_memory)
    assert offloaded["losses"] == reference["losses"]
    assert offloaded["weights"] == reference["weights"]


def test_frozen_parameters_in_files_are_saved(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = (*ALL_IN_FILES, "--frozen")
    first = train("nvme", *options, "--steps", 0, 3, "--save", tmp_path / "ck")
    rest = train("deepspeed_stage_3_offload", "--frozen", "--steps", 3, 5, "--load", tmp_path / "ck")
    again = train("nvme", *options, "--steps", 3, 5, "--load", tmp_path / "ck")
    assert rest["losses"] == again["losses"]
    assert first["losses"] + rest["losses"] == train("nvme", *options)["losses"]
