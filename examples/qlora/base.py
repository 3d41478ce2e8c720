"""The model that gets adapters: a checkpoint of the language model's example, or one trained here in a few seconds."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from data import TrainingOrder, Windows, read_text
from fabric_core import Fabric
from model import GPT, GPTConfig


def pretrained(fabric: Fabric, options: Namespace) -> GPT:
    """The model of ``--base`` in float32, which the first process trains if there is none."""
    with fabric.rank_zero_first():
        if not options.base.exists():
            with torch.random.fork_rng():  # what follows draws the same numbers whether there was a file or not
                pretrain(fabric, options)
    checkpoint = fabric.load(options.base)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model


def pretrain(fabric: Fabric, options: Namespace) -> None:
    """Teach Python to a small GPT, in float32 and without Fabric, and write it as the language model's example does."""
    config = GPTConfig(options.block_size, options.layers, options.heads, options.dim)
    model = GPT(config).to(fabric.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.base_steps, pct_start=0.1)
    windows = Windows(read_text()[0], options.block_size)
    order = TrainingOrder(len(windows), options.seed, 0, options.base_steps * options.batch_size)
    for inputs, targets in DataLoader(windows, batch_size=options.batch_size, sampler=order):
        logits = model(inputs.to(fabric.device))
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.to(fabric.device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    options.base.parent.mkdir(parents=True, exist_ok=True)
    checkpoint: dict[str, Any] = {"model": model.state_dict(), "config": asdict(config)}
    torch.save(checkpoint, options.base)
    fabric.print(f"{options.base_steps} steps on Python's own sources made {options.base}; training loss {loss:.2f}")
