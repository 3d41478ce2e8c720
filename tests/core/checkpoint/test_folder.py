"""A sharded folder as an opened checkpoint: the containers that were saved are there again."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fabric_core import Fabric
from fabric_core.checkpoint.conversion.consolidate import consolidate
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.checkpoint.sharded.write import write_sharded

KINDS = {"SGD": {"lr": 0.1}, "AdamW": {}}


def trained(kind, seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Linear(2, 2)
    optimizer = getattr(torch.optim, kind)(module.parameters(), **KINDS[kind])
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


def ours(path, state):
    write_sharded(path, state, {}, ranks_of(None))


def foreign(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return len(one) == len(other) and all(map(equal, one, other)) if isinstance(one, list) else one == other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [ours, foreign])
def test_numbered_optimizer_state_comes_back_by_numbers_as_from_the_consolidated_file(write, kind, tmp_path):
    module, optimizer = trained(kind)
    write(tmp_path / "x", {"model": module.state_dict(), "optimizer": optimizer.state_dict()})
    fabric = Fabric(accelerator="cpu", devices=1)
    content = fabric.load(tmp_path / "x")
    assert equal(content["optimizer"], optimizer.state_dict())
    assert equal(content, fabric.load(consolidate(tmp_path / "x")))


@pytest.mark.parametrize("write", [ours, foreign])
def test_an_optimizer_without_state_loads_strictly(write, tmp_path):
    module, optimizer = trained("SGD")
    write(tmp_path / "x", {"model": module.state_dict(), "optimizer": optimizer.state_dict()})
    for with_hook in (False, True):
        other, its_optimizer = trained("SGD", seed=1)
        its_optimizer.param_groups[0]["lr"] = 7.0
        if with_hook:  # then only the optimizer's own loading can tell what fits
            its_optimizer.register_load_state_dict_pre_hook(lambda _, state: dict(state))
        Fabric(accelerator="cpu", devices=1).load(tmp_path / "x", {"model": other, "optimizer": its_optimizer})
        assert equal(other.state_dict(), module.state_dict())
        assert equal(its_optimizer.state_dict(), optimizer.state_dict())
