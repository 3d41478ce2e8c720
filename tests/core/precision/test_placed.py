"""The precision's look at a module that is on its device already."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.abc import Precision


class Noting(Precision):
    """Notes when it was called, and changes values on the device."""

    def __init__(self):
        self.seen = []

    def convert_module(self, module):
        self.seen.append("convert")
        return nn.Sequential(module)

    def convert_placed_module(self, module, ranks):
        self.seen.append((type(module), {p.device for p in module.parameters()}, ranks.world_size, ranks.root_device))
        with torch.no_grad():
            module[0].weight.fill_(2.0)


class Fabrics:
    def __init__(self):
        self.precision = Noting()
        self.fabric = Fabric(accelerator="cpu", devices=1, plugins=[self.precision])


@pytest.fixture
def made():
    return Fabrics()


@pytest.mark.parametrize("method", ["setup", "setup_module"])
def test_it_comes_after_the_move_with_the_converted_module(made, method):
    model = getattr(made.fabric, method)(nn.Linear(2, 2))
    cpu = torch.device("cpu")
    assert made.precision.seen == ["convert", (nn.Sequential, {cpu}, 1, cpu)]
    assert (model.module[0].weight == 2).all()


def test_it_comes_before_the_strategy_wraps_the_module(fake_backend):
    precision = Noting()
    fabric = Fabric(accelerator="fake", strategy="fake", plugins=[precision])
    fabric.launch()
    fabric.setup(nn.Linear(2, 2))
    assert precision.seen[1][0] is nn.Sequential


def test_it_does_not_come_without_a_move(made):
    made.fabric.setup(nn.Linear(2, 2), move_to_device=False)
    assert made.precision.seen == ["convert"]


def test_the_default_does_nothing():
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    assert Precision().convert_placed_module(module, None) is None
    assert torch.equal(module.weight, before)
