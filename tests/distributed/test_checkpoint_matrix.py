"""A checkpoint of any strategy and number of processes continues under any other, as if nothing had happened."""

import pytest
import torch
from torch import nn

from distributed.small_model import needs_fsdp
from fabric_core import Fabric
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.strategies import FSDPStrategy, ModelParallelStrategy
from fabric_core.strategies.sharded.checkpoints import gathered

pytestmark = needs_fsdp
VOCABULARY, WIDTH, HIDDEN = 11, 6, 10  # by 4 nothing can be divided, by 2 what tensor parallelism splits


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """With a tied pair, a buffer and a frozen parameter."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.Sequential(Block(), Block())
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens):
        self.seen += 1
        return self.head(self.blocks(self.embedding(tokens) + self.frozen))


def parallelize(module, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in module.blocks:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if mesh["data_parallel"].size() > 1:
            fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"]) if mesh["data_parallel"].size() > 1 else module


# Name: processes, and the strategy for a form of checkpoint.
WAYS = {
    "single": (1, lambda form: "auto"),
    "ddp 2": (2, lambda form: "ddp"),
    "fsdp 2": (2, lambda form: FSDPStrategy(auto_wrap_policy={Block}, state_dict_type=form)),
    "fsdp 4": (4, lambda form: FSDPStrategy(auto_wrap_policy={Block}, state_dict_type=form)),
    "tp 2": (2, lambda form: tensor_parallel(1, form)),
    "fsdp 2 x tp 2": (4, lambda form: tensor_parallel(2, form)),
}
SAVED = [
    (way, form) for way in WAYS for form in ("full", "sharded") if form == "full" or way.startswith(("fsdp", "tp"))
]


def tensor_parallel(data, form):
    return ModelParallelStrategy(
        parallelize,
        data_parallel_size=data,
        tensor_parallel_size=2,
        save_distributed_checkpoint=form == "sharded",
    )


def make(way, form="full", seed=0):
    devices, strategy = WAYS[way]
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy(form))
    fabric.launch()
    module = Model(seed)
    vectors = [p for p in module.parameters() if p.dim() == 1]
    matrices = [p for p in module.parameters() if p.dim() == 2]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 0.02}]
    model, optimizer = fabric.setup(module, torch.optim.AdamW(groups, lr=0.01))
    return fabric, model, optimizer


def step(fabric, model, optimizer, number):
    """The loss before the step; every rank trains on the same batch."""
    tokens = torch.randint(VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(number))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def contents(model, optimizer):
    """Whole tensors of the model by name, of the optimizer by number, on rank 0."""
    whole = gathered({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}, ranks_of())
    return whole or {}


def difference(a, b, place=""):
    """Where two contents differ, or nothing."""
    if isinstance(a, torch.Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else place
    if isinstance(a, dict):
        return place if a.keys() != b.keys() else "".join(difference(a[k], b[k], f"{place}/{k}") for k in a)
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=True)
        return "".join(difference(x, y, f"{place}/{i}") for i, (x, y) in enumerate(pairs))
    return "" if a == b else place


def save(way, form, folder):
    fabric, model, optimizer = make(way, form)
    for number in range(3):
        step(fabric, model, optimizer, number)
    fabric.save(folder / f"{way} {form}", {"model": model, "optimizer": optimizer, "steps": 3})
    if fabric.is_global_zero:
        torch.save(contents(model, optimizer), folder / f"{way} {form} contents")
    else:
        contents(model, optimizer)
    return [step(fabric, model, optimizer, number) for number in (3, 4)]


def load(way, folder, started):
    """What differs from what was saved, and the losses of the next two steps, by source."""
    results = {}
    for source in SAVED:
        fabric, model, optimizer = make(way, seed=1)
        if started:
            step(fabric, model, optimizer, 9)
        name = " ".join(source)
        state = {"model": model, "optimizer": optimizer, "steps": 0}
        fabric.load(folder / name, state)
        found = contents(model, optimizer)
        wanted = torch.load(folder / f"{name} contents")
        different = difference(wanted, found) if fabric.is_global_zero else ""
        different += "" if state["steps"] == 3 and model.head.weight is model.embedding.weight else "steps or tie"
        results[name] = different, [step(fabric, model, optimizer, number) for number in (3, 4)]
    return results


@pytest.fixture(scope="module")
def run(workers):
    def run(way, function, *args):
        devices = WAYS[way][0]
        return function(way, *args) if devices == 1 else workers(devices).run(function, way, *args)[0]

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run):
    """The folder with all checkpoints, and the losses that followed them."""
    folder = tmp_path_factory.mktemp("matrix")
    return folder, {" ".join(source): run(source[0], save, source[1], folder) for source in SAVED}


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
@pytest.mark.parametrize("way", WAYS)
def test_every_checkpoint_continues_under(way, started, saved, run):
    folder, losses = saved
    for name, (different, following) in run(way, load, folder, started).items():
        assert not different, f"{name} -> {way}"
        assert following == pytest.approx(losses[name], abs=1e-5), f"{name} -> {way}"
