"""Telling wrapped objects from bare ones, and getting back to what is inside."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_core import Fabric, wrappers
from fabric_core.wrappers import is_wrapped
from fabric_core.wrappers.unwrap import unwrap, unwrap_objects


@pytest.fixture
def objects(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2)
    fabric.launch()
    module = nn.Linear(2, 1)
    inner = torch.optim.SGD(module.parameters())
    model, optimizer = fabric.setup(module, inner)
    return model, optimizer, fabric.setup_dataloaders(DataLoader(range(4))), inner


def test_what_fabric_set_up_is_wrapped(objects):
    assert [is_wrapped(each) for each in objects] == [True, True, True, False]


@pytest.mark.parametrize("bare", [nn.Linear(1, 1), DataLoader([1]), None, "text", 3])
def test_anything_else_is_not(bare):
    assert not is_wrapped(bare)
    assert unwrap(bare) is bare


def test_a_module_unwraps_to_what_the_strategy_made(objects):
    model = objects[0]
    assert unwrap(model) is model._forward_module
    assert type(unwrap(model)).__name__ == "FakeWrapper"


def test_optimizers_and_loaders_unwrap_to_the_inner_ones(objects):
    _, optimizer, loader, inner = objects
    assert unwrap(optimizer) is inner
    assert unwrap(loader) is loader.dataloader


def test_collections_unwrap_at_any_depth(objects):
    model, optimizer, _, inner = objects
    found = unwrap_objects({"model": model, "deep": [{"optimizer": optimizer}], "epoch": 3})
    assert found["model"] is unwrap(model)
    assert found["deep"][0]["optimizer"] is inner
    assert found["epoch"] == 3


def test_the_older_spellings_name_the_same_classes():
    assert wrappers._FabricModule is wrappers.FabricModule
    assert wrappers._FabricOptimizer is wrappers.FabricOptimizer
    assert wrappers._FabricDataLoader is wrappers.FabricDataLoader
    assert wrappers._unwrap_objects is unwrap_objects
    with pytest.raises(AttributeError, match="no attribute 'Absent'"):
        wrappers.Absent  # noqa: B018
