"""What the strategies of fabric-deepspeed add to a training step, held against an engine driven by hand.

Run it in two processes: ``fabric run --devices 2 --accelerator cpu benchmarks/deepspeed_step.py``. Both ways take turns
in the same processes, step by step, so that a busy moment of the machine hits both. The engine by hand gets the
configuration that the strategy made.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_core import Fabric

STEPS, WARM_UP = 80, 8


def transformer() -> nn.Module:
    """2.1 million parameters in four blocks."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(208, 4, 832, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, 4, enable_nested_tensor=False)


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """How long the slowest rank took, and what this one computed meanwhile: waiting does not count there."""
    dist.barrier()
    start, busy = time.perf_counter(), time.thread_time()
    action()
    taken, busy = torch.tensor(time.perf_counter() - start), time.thread_time() - busy
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken), busy


def in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[tuple[float, float]], ...]:
    """The times of two actions that alternate; each is the first to run every other time."""
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    for round_ in range(WARM_UP + STEPS):
        for which in (0, 1) if round_ % 2 else (1, 0):
            taken = seconds((first, second)[which])
            if round_ >= WARM_UP:
                times[which].append(taken)
    return times


def compare(fabric: Fabric, stage: int, x: Tensor) -> None:
    """Print the median times of a step, both ways, and the median of the ratios of neighbours."""
    import deepspeed

    module = transformer()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-4))
    bare = transformer()
    engine, *_ = deepspeed.initialize(
        model=bare,
        optimizer=torch.optim.AdamW(bare.parameters(), lr=1e-4),
        config=copy.deepcopy(fabric.strategy.config),
        dist_init_required=False,
    )

    def by_hand() -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    def with_fabric() -> None:
        fabric.backward(model(x).square().mean(), model=model)
        optimizer.step()
        optimizer.zero_grad()

    for what, bare_times, times in zip(
        ("time", "CPU time"), *map(columns, in_turns(by_hand, with_fabric)), strict=True
    ):
        raw, ours = statistics.median(bare_times), statistics.median(times)
        ratio = statistics.median(b / a for a, b in zip(bare_times, times, strict=True))
        fabric.print(
            f"stage {stage}, {what}: by hand {raw * 1e3:.2f} ms, Fabric {ours * 1e3:.2f} ms ({ours / raw:.3f}x; "
            f"median of neighbours {ratio:.3f}x)"
        )


def columns(rows: list[tuple[float, float]]) -> list[tuple[float, ...]]:
    """Of pairs, the first of each and the second of each."""
    return list(zip(*rows, strict=True))


def main() -> None:
    """Print two lines for each stage."""
    torch.set_num_threads(1)
    for stage in (1, 2, 3):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=f"deepspeed_stage_{stage}")
        fabric.launch()
        compare(fabric, stage, torch.randn(4, 32, 208))


if __name__ == "__main__":
    main()
