"""Memory of a rank while a model that has none yet is sharded and a checkpoint is loaded into it.

Usage: python benchmarks/sharded_memory.py [MILLIONS OF PARAMETERS]. Linux only: it reads and resets the peak in /proc.

A block of the model is one unit of sharding. The bound that is printed is 1.2 x (a rank's shard + one block).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy
from fabric_core.testing import WorkerPool

RANKS, WIDTH, HIDDEN = 2, 2048, 8192
MIB = 2**20


class Block(nn.Module):
    """16.8 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A unit must be callable; here nobody calls it."""
        return self.up(x)


def build(millions: int) -> nn.Module:
    """The model, on whatever device is current."""
    return nn.Sequential(*(Block() for _ in range(round(millions * 1e6 / (WIDTH * HIDDEN)))))


def started(form: str) -> Fabric:
    """This rank's Fabric."""
    strategy = FSDPStrategy(auto_wrap_policy={Block}, state_dict_type=form)  # type: ignore[arg-type]
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
    fabric.launch()
    return fabric


def save(millions: int, folder: Path) -> None:
    """Write the checkpoint in both forms."""
    for form in ("sharded", "full"):
        fabric = started(form)
        with fabric.init_module(empty_init=True):
            module = build(millions)
        fabric.save(folder / form, {"model": fabric.setup_module(module)})


def load(millions: int, path: Path, measured: bool) -> tuple[int, int]:
    """Peak of resident memory above what there was before, and this rank's share of the model, in bytes."""
    fabric = started(path.name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is used now
    before = memory("VmRSS")
    with fabric.init_module(empty_init=True):
        module = build(millions)
    model = fabric.setup_module(module)
    fabric.load(path, {"model": model})
    peak = memory("VmHWM") - before
    assert not measured or all(torch.isfinite(p.to_local()).all() for p in model.parameters())  # type: ignore[operator]
    return peak, sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[operator]


def memory(key: str) -> int:
    """An entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measure(millions: int) -> dict[str, tuple[int, int]]:
    """The higher of the ranks' peaks, and a rank's share, by form; in fresh processes that have loaded once before."""
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writers = WorkerPool(RANKS)
        writers.run(save, millions, folder, timeout=300.0)
        writers.run(save, 17, folder / "small", timeout=300.0)
        writers.stop()
        for form in ("sharded", "full"):
            pool = WorkerPool(RANKS)
            pool.run(load, 17, folder / "small" / form, False, timeout=300.0)  # what is imported on first use
            figures[form] = max(pool.run(load, millions, folder / form, True, timeout=300.0))
            pool.stop()
    return figures


if __name__ == "__main__":
    block = WIDTH * HIDDEN * 4
    for form, (peak, share) in measure(int(sys.argv[1]) if len(sys.argv) > 1 else 200).items():
        bound = 1.2 * (share + block)
        print(f"{form}: peak {peak / MIB:.0f} MiB, shard {share / MIB:.0f}, bound {bound / MIB:.0f}", flush=True)
