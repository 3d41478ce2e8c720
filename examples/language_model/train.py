"""Teach a small GPT to write Python, byte by byte, from the sources of the standard library.

Read `main` first: it is the whole job. What has to do with devices, processes, precision and checkpoints is a call on
`fabric`; the rest is plain PyTorch. The README lists commands to try.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from data import TrainingOrder, Windows, read_text, spread
from fabric_core import Fabric
from fabric_core.wrappers import FabricModule
from model import GPT, GPTConfig
from options import fabric_options, parse_options
from progress import progress
from report import draw_losses, write_losses

Batch = tuple[Tensor, Tensor]


def main(fabric: Fabric, options: Namespace) -> None:
    """Train from the beginning, or from a checkpoint, to the last step; then show what was learnt."""
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    fabric.seed_everything(options.seed, verbose=False)
    config = GPTConfig(options.block_size, options.layers, options.heads, options.dim, options.dropout)
    model = GPT(config)
    optimizer = AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, options.steps))
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("generate")

    # All that a run needs to go on: the position in the data and the random numbers follow from the step.
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state |= {"config": asdict(config), "step": 0, "train": [], "validation": []}
    if options.resume:
        fabric.load(options.checkpoint, state)

    training, validation = dataloaders(fabric, options, state["step"])
    train(fabric, options, state, training, validation)
    fabric.save(options.checkpoint, state)

    fabric.print(f"\n{sample(fabric, model, options.seed)}\n")
    if fabric.is_global_zero:
        write_losses(options.losses, state["train"], state["validation"])
        fabric.print(draw_losses(options.out / "losses.png", state["train"], state["validation"]))
    fabric.print(f"{state['step']} steps are done; this run took {time.perf_counter() - began:.0f} s")


def dataloaders(fabric: Fabric, options: Namespace, step: int) -> list[DataLoader[Batch]]:
    """The training data from ``step`` on, and a fixed selection of the validation data."""
    parts = fabric.world_size * options.accumulate
    if options.batch_size % parts:
        raise SystemExit(
            f"--batch-size {options.batch_size} does not divide into {parts} equal parts (processes x --accumulate)."
        )
    train_text, validation_text = read_text(options.data)
    windows, unseen = Windows(train_text, options.block_size), Windows(validation_text, options.block_size)
    order = TrainingOrder(len(windows), options.seed, step * options.batch_size, options.steps * options.batch_size)
    some = spread(unseen, options.eval_batches * options.batch_size)
    fabric.print(f"{len(train_text) / 1e6:.1f} MB of text as {len(windows):,} windows; processes: {fabric.world_size}")
    loaders: list[DataLoader[Batch]] = fabric.setup_dataloaders(
        DataLoader(windows, batch_size=options.batch_size // parts, sampler=order),
        DataLoader(some, batch_size=options.batch_size // fabric.world_size),
    )
    return loaders


def train(
    fabric: Fabric,
    options: Namespace,
    state: dict[str, Any],
    training: DataLoader[Batch],
    validation: DataLoader[Batch],
) -> None:
    """Take the steps that are left, up to ``--stop-after``, and write into ``state`` how they went."""
    first, last = state["step"], min(options.steps, options.stop_after or options.steps)
    batches = iter(training)
    with progress(first, last, options.batch_size * options.block_size, visible=fabric.is_global_zero) as display:
        for step in range(first, last):
            if step % options.eval_every == 0:
                display.note(validate(fabric, state, validation))
            parts = list(islice(batches, options.accumulate))
            # The random numbers of a step (dropout) follow from its number, so that a resumed run draws the same ones.
            torch.manual_seed(options.seed + step * fabric.world_size + fabric.global_rank)
            loss = training_step(fabric, state["model"], state["optimizer"], parts)
            state["scheduler"].step()
            state["step"] = step + 1
            state["train"].append((step + 1, loss))
            display.update(step + 1, loss)
            if options.checkpoint_every and (step + 1) % options.checkpoint_every == 0:
                fabric.save(options.checkpoint, state)
        if first < last == options.steps:
            display.note(validate(fabric, state, validation))


def training_step(fabric: Fabric, model: FabricModule, optimizer: Optimizer, parts: list[Batch]) -> float:
    """Make one update from this process's parts of the global batch; return the mean loss over all of it."""
    mean = torch.zeros((), device=fabric.device)
    for number, part in enumerate(parts, start=1):
        with fabric.no_backward_sync(model, enabled=number < len(parts)):
            loss = next_byte_loss(model, part) / len(parts)
            fabric.backward(loss)
        mean += loss.detach()
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(fabric.all_reduce(mean, reduce_op="mean"))


@torch.no_grad()
def validate(fabric: Fabric, state: dict[str, Any], validation: DataLoader[Batch]) -> str:
    """Record the mean loss over the validation windows of all processes; return a sentence about it."""
    model = state["model"]
    model.eval()
    losses = torch.stack([next_byte_loss(model, batch) for batch in validation])
    model.train()
    loss = float(fabric.all_reduce(losses.mean(), reduce_op="mean"))
    state["validation"].append((state["step"], loss))
    return f"after {state['step']:,} steps: validation loss {loss:.3f}"


def next_byte_loss(model: FabricModule, batch: Batch) -> Tensor:
    """Cross-entropy in nats per byte."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def sample(fabric: Fabric, model: FabricModule, seed: int, prompt: str = "def ", count: int = 400) -> str:
    """Let the model go on after ``prompt``; every process must call this, and all get the same text."""
    torch.manual_seed(seed)
    model.eval()
    tokens = model.generate(torch.tensor([list(prompt.encode())], device=fabric.device), count)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def learning_rate(step: int, steps: int) -> float:
    """The share of the highest rate: up in a line over the first twentieth, then down half a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1.0))) / 2


if __name__ == "__main__":
    options = parse_options()
    fabric = Fabric(**fabric_options(options))
    fabric.launch(main, options)
