"""Sharded training and checkpoints against hand-written ``fully_shard`` and ``torch.distributed.checkpoint``.

Run it in two processes: ``fabric run --devices 2 --accelerator cpu benchmarks/sharded.py``. Both ways take turns in the
same processes, so that a busy moment of the machine hits both. Needs 4 GB of memory and 3 GB in the temporary folder.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy

STEPS, ROUNDS = 12, 5


def seconds(action: Callable[[], object]) -> float:
    """How long the slowest rank took."""
    dist.barrier()
    start = time.perf_counter()
    action()
    taken = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def in_turns(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of two actions that alternate; a round of each comes before, unmeasured."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def transformer() -> nn.Module:
    """Some 10 million parameters in six blocks."""
    block = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, 6, enable_nested_tensor=False)


def stack() -> nn.Module:
    """84 million parameters; with the two moments of AdamW, 1 GB."""
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(20)))


def trained(fabric: Fabric) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The stack after one step, so that the optimizer has its state."""
    model = stack()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    fabric.backward(model(torch.ones(1, 2048)).sum())
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def by_hand(model: nn.Module, blocks: nn.Module) -> nn.Module:
    """Shard as one would without Fabric."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare_steps(fabric: Fabric) -> None:
    """Print the time of a training step."""
    x = torch.randn(4, 128, 384)
    bare_model = transformer()
    bare_model = by_hand(bare_model, bare_model.layers)
    bare_optimizer = torch.optim.AdamW(bare_model.parameters(), lr=1e-4)
    model = transformer()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-4))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], object]) -> None:
        backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    bare, ours = in_turns(
        lambda: step(bare_model, bare_optimizer, Tensor.backward),
        lambda: step(model, optimizer, fabric.backward),
        STEPS,
    )
    fabric.print(f"step:  by hand {bare * 1e3:.0f} ms, Fabric {ours * 1e3:.0f} ms ({ours / bare:.3f}x)")


def compare_checkpoints(fabric: Fabric, folder: Path) -> None:
    """Print the times of saving and loading, and for how long a save in the background holds training up."""
    model, optimizer = trained(fabric)

    def torch_state() -> dict[str, object]:
        model_state, optimizer_state = get_state_dict(model.module, optimizer.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    state = {"model": model, "optimizer": optimizer}
    bare, ours = in_turns(
        lambda: dcp.save(torch_state(), checkpoint_id=folder / "torch"),
        lambda: fabric.save(folder / "fabric", state),
        ROUNDS,
    )
    fabric.print(f"save:  torch {bare:.2f} s, Fabric {ours:.2f} s ({ours / bare:.2f}x)")
    bare, ours = in_turns(
        lambda: dcp.load(torch_state(), checkpoint_id=folder / "torch"),
        lambda: fabric.load(folder / "fabric", state),
        ROUNDS,
    )
    fabric.print(f"load:  torch {bare:.2f} s, Fabric {ours:.2f} s ({ours / bare:.2f}x)")


def compare_stall(fabric: Fabric, folder: Path) -> None:
    """Print for how long a save in the background holds training up, against copying the same bytes."""
    model, optimizer = trained(fabric)
    moments = [moment for kept in optimizer.state.values() for moment in kept.values() if moment.ndim]
    shards = [tensor.to_local().detach() for tensor in [*model.parameters(), *moments]]
    buffers = [torch.empty_like(shard) for shard in shards]
    finish = fabric.strategy.checkpoint_io.drain
    state = {"model": model, "optimizer": optimizer}

    def copy() -> None:
        for buffer, shard in zip(buffers, shards, strict=True):
            buffer.copy_(shard)

    copying, stalls = [], []
    for round_ in range(ROUNDS + 1):
        copying.append(seconds(copy))
        stalls.append(seconds(lambda: fabric.save(folder / "background", state)))
        finish()
        if round_ == 0:  # the first save makes the buffers
            fabric.print(f"first save in the background: {stalls[0]:.3f} s")
            copying.clear(), stalls.clear()
    copy_s, stall = statistics.median(copying), statistics.median(stalls)
    fabric.print(f"stall: copy {copy_s:.3f} s, save in the background {stall:.3f} s ({stall / copy_s:.2f}x)")


def main() -> None:
    """Print one line for each comparison."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy())
    fabric.launch()
    folder = Path(fabric.broadcast(tempfile.mkdtemp(prefix="sharded-")))
    try:
        compare_steps(fabric)
        compare_checkpoints(fabric, folder)
        background = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(), checkpoint_io="async")
        background.launch()
        compare_stall(background, folder)
        fabric.barrier()
    finally:
        if fabric.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
