"""A small sharded model to save and load, and what its contents are."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy


def launched(form="sharded", strategy=None, **arguments):
    strategy = strategy or FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type=form)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **arguments)
    fabric.launch()
    return fabric


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def set_up(fabric, seed=0, steps=0, kind=torch.optim.AdamW, **options):
    module = network(seed)
    model, optimizer = fabric.setup(module, kind(module.parameters(), **{"lr": 0.01, **options}))
    train(fabric, model, optimizer, steps)
    return model, optimizer


def train(fabric, model, optimizer, steps):
    for _ in range(steps):
        fabric.backward(model(torch.arange(12.0).reshape(4, 3)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def whole(tree):
    """Nested contents with whole tensors, on every rank."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree.full_tensor() if isinstance(tree, DTensor) else tree.clone() if isinstance(tree, torch.Tensor) else tree


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def states(*objects):
    """Their contents on every rank; ``state_dict`` of a set-up optimizer has them on rank 0."""
    return [whole(dict(getattr(o, "optimizer", o).state_dict())) for o in objects]


def message(call, *args, **kwargs):
    """The type and text of the error that a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
