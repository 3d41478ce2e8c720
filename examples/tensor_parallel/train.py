"""Teach a transformer to add, its matrices split over devices (tensor parallel) and its weights sharded (FSDP).

``--tensor-parallel`` devices work on the same sums, each on its part of every matrix; ``--data-parallel`` such groups
work on different sums, and shard what is left of the weights. The checkpoint fits any other split.
"""

from __future__ import annotations

import functools
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from data import CHARACTERS, PROMPT, Sums
from fabric_core import Fabric
from fabric_core.strategies import ModelParallelStrategy
from model import Config, Transformer
from plan import parallelize


def main(fabric: Fabric, options: Namespace) -> None:
    """Train up to ``--steps``, from the beginning or from the checkpoint, then test on unseen sums."""
    torch.set_num_threads(1)
    fabric.seed_everything(options.seed, verbose=False)
    # On the meta device: no process ever holds the whole model. Set-up gives each its share, initialised.
    with fabric.init_module(empty_init=True):
        model = Transformer(Config(len(CHARACTERS), options.layers, options.heads, options.dim))
    model = fabric.setup_module(torch.compile(model) if options.compile else model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=options.lr))

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    if options.resume:
        fabric.load(options.checkpoint, state)
    train(fabric, options, state)
    fabric.save(options.checkpoint, state)
    fabric.print(f"unseen sums that come out right: {accuracy(fabric, model, options):.0%}")


def train(fabric: Fabric, options: Namespace, state: dict[str, Any]) -> None:
    """Take the steps that are left. The sums of a step follow from its number, on any number of devices."""
    model, optimizer = state["model"], state["optimizer"]
    sums = Sums(options.steps * options.batch_size, options.seed)
    left = torch.utils.data.Subset(sums, range(state["step"] * options.batch_size, len(sums)))
    loader = fabric.setup_dataloaders(DataLoader(left, batch_size=options.batch_size // options.data_parallel))
    for characters, targets in loader:
        loss = functional.cross_entropy(model(characters).flatten(0, 1), targets.flatten())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] % options.report_every == 0:
            mean = float(fabric.all_reduce(loss.detach(), reduce_op="mean"))
            fabric.print(f"step {state['step']:5,}: loss {mean:.6f} nats per digit")


@torch.no_grad()
def accuracy(fabric: Fabric, model: Any, options: Namespace, count: int = 512) -> float:
    """The share of ``count`` sums, not trained on, of which every digit is right. All processes work on all of them."""
    batch = torch.utils.data.default_collate(list(Sums(count, options.seed, unseen=True)))
    characters, targets = fabric.to_device(batch)
    written = characters.clone()
    written[:, PROMPT:] = 0
    for place in range(PROMPT, written.shape[1] + 1):  # always the whole length: a split sequence needs an even one
        digit = model(written)[:, place - 1].argmax(-1)
        written = torch.cat([written[:, :place], digit[:, None], written[:, place + 1 :]], dim=1)
    answer: Tensor = targets[:, PROMPT - 1 :]
    return float((written[:, PROMPT:] == answer).all(dim=1).float().mean())


def parse_options() -> Namespace:
    """What the user typed."""
    parser = ArgumentParser(description="Teach a transformer to add.", formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--tensor-parallel", type=int, default=2, help="devices that share every matrix")
    add("--data-parallel", type=int, default=1, help="groups of such devices; the weights are sharded over them")
    add("--sequence", action="store_true", help="norms work on parts of the sequence, too")
    add("--compile", action="store_true", help="compile the model")
    add("--accelerator", default="auto", help="see Fabric(accelerator=...)")
    add("--precision", default="32-true", help="see Fabric(precision=...)")
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=64, help="sums per step, over all processes")
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    for name, default in {"layers": 2, "heads": 4, "dim": 64}.items():
        add(f"--{name}", type=int, default=default)
    add("--report-every", type=int, default=100, help="steps between lines")
    add("--checkpoint", type=Path, default=Path("runs/tensor_parallel/checkpoint"), help="a folder")
    add("--resume", action="store_true", help="go on from --checkpoint, split like this or in any other way")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    strategy = ModelParallelStrategy(
        functools.partial(parallelize, sequence=options.sequence),
        data_parallel_size=options.data_parallel,
        tensor_parallel_size=options.tensor_parallel,
    )
    devices = options.data_parallel * options.tensor_parallel
    fabric = Fabric(accelerator=options.accelerator, devices=devices, strategy=strategy, precision=options.precision)
    fabric.launch(main, options)
