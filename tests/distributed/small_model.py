"""A small transformer, ways of splitting it, and a training loop that any strategy can run."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy, ModelParallelStrategy

needs_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch shards on CPU from 2.7 on")

VOCABULARY, DIM, TIME = 16, 8, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 3 * DIM), nn.Linear(3 * DIM, DIM)
        self.query = nn.Linear(DIM, DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x):
        heads = self.query(x).unflatten(-1, (-1, 2)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """``bias`` is a parameter of the root itself, of a size that two processes cannot share evenly."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.bias = nn.Parameter(torch.zeros(3))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def reset_parameters(self):
        nn.init.zeros_(self.bias)

    def forward(self, tokens):
        x = self.embedding(tokens) + nn.functional.pad(self.bias, (0, DIM - 3))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, tokens):
        logits = self(tokens)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def generate(self, tokens, steps):
        for _ in range(steps):
            following = self(tokens)[:, -1] + nn.functional.pad(self.bias, (0, VOCABULARY - 3))
            tokens = torch.cat([tokens, following.argmax(-1, keepdim=True)], 1)
        return tokens

    def continued(self, tokens, steps):
        for _ in range(steps):
            tokens = torch.cat([tokens, self(tokens)[:, -1:].argmax(-1)], 1)
        return tokens

    def total_bias(self, one):
        return (self.bias * one).sum()


def fsdp(module, mesh):
    for block in module.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def tensor_parallel(module, mesh):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "query": ColwiseParallel(), "out": RowwiseParallel()}
    for block in module.blocks:
        parallelize_module(block, mesh["tensor_parallel"], plan)
    return module


def both(module, mesh):
    return fsdp(tensor_parallel(module, mesh), mesh)


def make_strategy(name, devices, **options):
    """A strategy by a short name, and over how many groups it divides a batch."""
    if name == "tp":
        return ModelParallelStrategy(tensor_parallel, 1, devices, **options), 1
    if name == "fsdp by hand":
        return ModelParallelStrategy(fsdp, devices, 1, **options), devices
    if name == "fsdp x tp":
        return ModelParallelStrategy(both, devices // 2, 2, **options), devices // 2
    if name == "hsdp":
        return FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(devices // 2, 2), **options), devices
    return FSDPStrategy(sharding_strategy=name, **options), devices


def batches(steps, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (steps, size, TIME), generator=generator)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def build(fabric, meta=False, tied=False, blocks_first=False):
    """The model, with the same values whether its parameters had memory from the start or get it at set-up.

    FSDPStrategy gives the blocks memory first; then the order in which random numbers are drawn is another one.
    """
    torch.manual_seed(7)
    with fabric.init_module(empty_init=meta):
        module = Model(tied)
    if not meta:
        torch.manual_seed(7)
        order = [*(_children_first(module.blocks) if blocks_first else ()), *_children_first(module)]
        for part in dict.fromkeys(order):
            if hasattr(part, "reset_parameters") and not (tied and part is module.head):
                part.reset_parameters()
    torch.manual_seed(7)
    return module


def _children_first(module):
    for child in module.children():
        yield from _children_first(child)
    yield module


@dataclass(frozen=True)
class Run:
    """What is trained, and how; ``strategy`` are arguments that only the strategy needs to know."""

    precision: str = "32-true"
    optimizer: str = "AdamW"
    steps: int = 20
    accumulate: int = 1
    clip: dict | None = None
    built: dict = field(default_factory=dict)
    strategy: dict = field(default_factory=dict)


def train(devices, name, run):
    """Losses, gradient norms and final parameters of steps on batches of 8 sequences."""
    strategy, groups = make_strategy(name, devices, **run.strategy) if devices > 1 else ("auto", 1)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, precision=run.precision)
    fabric.launch()
    module = build(fabric, **run.built)
    model, optimizer = fabric.setup(module, getattr(torch.optim, run.optimizer)(module.parameters(), lr=0.01))
    share = strategy.distributed_sampler_kwargs["rank"] if devices > 1 else 0
    losses, norms = [], []
    for batch in batches(run.steps, 8):
        total = 0.0
        for index, part in enumerate(batch.chunk(run.accumulate)):
            with fabric.no_backward_sync(model, enabled=index < run.accumulate - 1):
                loss = model.training_step(part.chunk(groups)[share]) / run.accumulate
                fabric.backward(loss)
                total += loss.item()
        if run.clip is not None:
            norm = fabric.clip_gradients(model, optimizer, **run.clip)
            norms += [] if norm is None else [norm.item()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    losses = fabric.all_reduce(torch.tensor(losses)) if devices > 1 else torch.tensor(losses)
    parameters = {n: whole(p).float().numpy() for n, p in model.named_parameters()}
    return losses.tolist(), norms, parameters
