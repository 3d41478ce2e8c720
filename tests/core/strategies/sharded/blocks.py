"""A stack of blocks, a training loop, and what it comes to in one process."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy

needs_fsdp = pytest.mark.skipif(torch.__version__ < "2.8", reason="torch shards over two axes on CPU from 2.8 on")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Model(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.shift


def data():
    return torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(2))


def train(fabric, model):
    """Parameters after four steps, each rank on its rows of every batch."""
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    for batch in data():
        optimizer.zero_grad()
        fabric.backward(model(batch[fabric.global_rank :: fabric.world_size]).square().mean())
        optimizer.step()
    return model


def whole(model):
    full = ((n, p.full_tensor() if isinstance(p, DTensor) else p) for n, p in model.named_parameters())
    return {name: parameter.detach().numpy().copy() for name, parameter in full}


def sharded(**arguments):
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=FSDPStrategy(**arguments))
    fabric.launch()
    return fabric


def close(expected, found, tolerance=1e-6):
    return all(abs(value - found[name]).max() <= tolerance for name, value in expected.items())


@functools.cache
def trained_alone():
    """Parameters after the same steps in one process."""
    return whole(train(Fabric(accelerator="cpu", devices=1), Model()))
