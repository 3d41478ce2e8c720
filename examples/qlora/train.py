"""Freeze a small GPT in 4 bits, train low-rank adapters beside its layers on another text, and keep the adapters alone.

Read `main` first: it is the whole job. The frozen layers become 4-bit ones in `fabric.setup`, because the precision
says so; the loop is that of any other model. The README lists commands to try.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).resolve().parents[1] / "language_model"))  # its model, data and progress are used

import memory
from adapters import add_adapters, of_adapter
from base import pretrained
from data import TrainingOrder, Windows, read_text, spread
from fabric_core import Fabric
from fabric_core.wrappers import FabricModule
from options import fabric_options, parse_options
from progress import progress

Batch = tuple[Tensor, Tensor]


def main(fabric: Fabric, options: Namespace) -> None:
    """Adapt the model to the text; then show what is left of it in a file, and that the file is enough."""
    from bitsandbytes.optim import AdamW8bit  # after the precision, which imports bitsandbytes without its log lines

    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    fabric.seed_everything(options.seed, verbose=False)
    base = pretrained(fabric, options)
    before = memory.weights(base)
    parameters = add_adapters(base, options.rank, options.alpha, options.dropout)
    # Below 4,096 elements bitsandbytes would keep float32 states, and these adapters are smaller than that.
    optimizer = AdamW8bit(parameters, lr=options.lr, min_8bit_size=256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    model, optimizer = fabric.setup(base, optimizer)
    fabric.print(memory.comparison(before, memory.weights(model.module), options.precision))

    training, validation = dataloaders(fabric, model.config.block_size, options)
    train(fabric, options, model, optimizer, scheduler, training, validation)
    trained = sum(parameter.numel() for parameter in parameters)
    fabric.print(f"optimizer state of {trained:,} parameters: {memory.states(optimizer):,} bytes")

    fabric.save(options.adapters, {"model": model}, filter={"model": of_adapter})
    fabric.print(f"{options.adapters} has the adapters alone: {options.adapters.stat().st_size:,} bytes")
    again = pretrained(fabric, options)
    add_adapters(again, options.rank, options.alpha)
    reloaded = fabric.setup_module(again)
    fabric.load(options.adapters, {"model": reloaded}, strict=False)  # what is below the adapters is not in the file
    fabric.print(f"a new base with these adapters gives {compare(model, reloaded, validation)} outputs")
    fabric.print(f"this run took {time.perf_counter() - began:.0f} s")


def dataloaders(fabric: Fabric, block_size: int, options: Namespace) -> list[DataLoader[Batch]]:
    """The training data, and a fixed selection of the validation data."""
    if options.batch_size % fabric.world_size:
        raise SystemExit(f"--batch-size {options.batch_size} does not divide into {fabric.world_size} equal parts.")
    texts = documentation() if options.data is None else read_text(options.data)
    windows, unseen = (Windows(text, block_size) for text in texts)
    order = TrainingOrder(len(windows), options.seed, 0, options.steps * options.batch_size)
    some = spread(unseen, options.eval_batches * options.batch_size)
    size = options.batch_size // fabric.world_size
    loaders: list[DataLoader[Batch]] = fabric.setup_dataloaders(
        DataLoader(windows, batch_size=size, sampler=order), DataLoader(some, batch_size=size)
    )
    return loaders


def documentation() -> tuple[Tensor, Tensor]:
    """What Python's ``help()`` tells about the language, as ``uint8``: nine tenths to train on, and the rest."""
    from pydoc_data.topics import topics

    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def train(
    fabric: Fabric,
    options: Namespace,
    model: FabricModule,
    optimizer: Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    training: DataLoader[Batch],
    validation: DataLoader[Batch],
) -> None:
    """Take all steps."""
    tokens = options.batch_size * model.config.block_size
    with progress(0, options.steps, tokens, visible=fabric.is_global_zero) as display:
        for step, batch in enumerate(training):
            if step % options.eval_every == 0:
                display.note(f"after {step:,} steps: validation loss {validate(fabric, model, validation):.3f}")
            loss = next_byte_loss(model, batch)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            display.update(step + 1, float(fabric.all_reduce(loss.detach(), reduce_op="mean")))
        display.note(f"after {options.steps:,} steps: validation loss {validate(fabric, model, validation):.3f}")


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, validation: DataLoader[Batch]) -> float:
    """The mean loss over the validation windows of all processes."""
    model.eval()
    losses = torch.stack([next_byte_loss(model, batch) for batch in validation])
    model.train()
    return float(fabric.all_reduce(losses.mean(), reduce_op="mean"))


@torch.no_grad()
def compare(model: nn.Module, other: nn.Module, validation: DataLoader[Batch]) -> str:
    """``equal``, if both give the same logits for the validation windows; else by how much they differ."""
    pairs = [(model.eval()(inputs), other.eval()(inputs)) for inputs, _ in validation]
    if all(torch.equal(one, two) for one, two in pairs):
        return "equal"
    return f"other (by up to {max(float((one - two).abs().max()) for one, two in pairs):.2g})"


def next_byte_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats per byte."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


if __name__ == "__main__":
    options = parse_options()
    fabric = Fabric(**fabric_options(options))
    fabric.launch(main, options)
