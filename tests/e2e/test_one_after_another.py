"""Several Fabrics in the same processes: each leaves its process group, and the next one makes a group of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from fabric_core import Fabric

for number in range(5):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    total = fabric.all_reduce(torch.tensor(float(number + fabric.global_rank)), reduce_op="sum")
    fabric.print(int(total), end=" ", flush=True)
    fabric.teardown()
    del model, optimizer
"""


@pytest.mark.parametrize("command", [["-m", "fabric_core", "run", "--devices", "2", "--accelerator", "cpu"], []])
def test_groups_follow_each_other(tmp_path: Path, command: list[str]) -> None:
    """Started by ``fabric run``, and by the script itself."""
    script = tmp_path / "again.py"
    script.write_text(SCRIPT)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "FABRIC_"))}
    done = subprocess.run(
        [sys.executable, *command, str(script)], env=known, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "3", "5", "7", "9"]
