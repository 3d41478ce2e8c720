"""What Fabric adds to a training step of a model so small that nothing else shows: median microseconds, in turns.

The bare loop and Fabric's run alternately in one process, so that a busy moment of the machine hits both.
"""

from __future__ import annotations

import statistics
import time

import torch

from fabric_core import Fabric

STEPS, ROUNDS = 2000, 7


def microseconds(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: list, backward) -> float:
    """Mean time of a step."""
    start = time.perf_counter()
    for batch in loader:
        optimizer.zero_grad()
        backward(model(batch).sum())
        optimizer.step()
    return (time.perf_counter() - start) / STEPS * 1e6


def main() -> None:
    """Print one line for each precision."""
    torch.set_num_threads(1)
    batches = [torch.randn(8, 10) for _ in range(STEPS)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)

    def new() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(10, 1)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    fabric = Fabric(accelerator="cpu", devices=1)
    bare = (*new(), loader, torch.Tensor.backward)
    ours = (*fabric.setup(*new()), fabric.setup_dataloaders(loader), fabric.backward)
    times = [(microseconds(*bare), microseconds(*ours)) for _ in range(ROUNDS)]
    raw, full = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"bare loop {raw:.1f} us, with Fabric {full:.1f} us: +{full - raw:.1f} us ({full / raw:.2f}x)")


if __name__ == "__main__":
    main()
