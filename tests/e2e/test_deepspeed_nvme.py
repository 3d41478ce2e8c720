"""Parameters and optimizer state in files: the stage 3 preset for NVMe, on any disk."""

from __future__ import annotations

import json
import textwrap
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
    import json, sys
    from pathlib import Path
    import torch
    from fabric_core import Fabric
    from fabric_deepspeed.presets import stage_3_offload_nvme

    strategy = stage_3_offload_nvme(nvme_path=sys.argv[1]) if sys.argv[1:] else "ddp"
    fabric = Fabric(strategy=strategy, precision="bf16-true")
    fabric.launch()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.manual_seed(0)
    with fabric.init_module():
        wide = torch.nn.Linear(1024, 1024)  # small parameters stay in memory
        model = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.Tanh(), wide, torch.nn.Linear(1024, 1))
    optimizer = (DeepSpeedCPUAdam if sys.argv[1:] else torch.optim.AdamW)(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for step in range(5):
        torch.manual_seed(step)
        loss = (model(torch.randn(8, 64)) - 1).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    files = [path.stat().st_size for path in Path(*sys.argv[1:]).rglob("*.swp")]
    fabric.barrier()
    if fabric.is_global_zero:
        print(json.dumps({"losses": losses, "bytes": sum(files)}))
"""


def train(environment: Environment, program: Path, *arguments: str) -> dict[str, Any]:
    where = ("--accelerator", "cpu", "--devices", "2")
    done = environment.fabric("run", *where, str(program), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_trains_from_files(backends: Environment, tmp_path: Path) -> None:
    program, folder = tmp_path / "train.py", tmp_path / "nvme"
    program.write_text(textwrap.dedent(TRAIN))
    folder.mkdir()
    offloaded, reference = train(backends, program, str(folder)), train(backends, program)
    assert offloaded["losses"] == pytest.approx(reference["losses"], rel=0.05)
    assert offloaded["losses"][-1] < offloaded["losses"][0]
    assert offloaded["bytes"] > WEIGHTS * (4 + 4 + 4), "float32 weights and both moments are in files"
