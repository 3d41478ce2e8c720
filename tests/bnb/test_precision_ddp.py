"""Quantised layers on two ranks: the same bits everywhere, whatever each rank started from."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_core import Fabric

FROZEN = ["nf4", "nf4-dq", "fp4", "int8"]
TWO_RANKS = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


class Model(nn.Module):
    """A layer to be quantised and a scale to be trained."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(64, 32)
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return self.linear(x) * self.gain


def state(model):
    return {key: value.float().numpy() for key, value in model.state_dict().items()}


def equal(one, other):
    return list(one) == list(other) and all((one[key] == other[key]).all() for key in one)


def launched(mode):
    fabric = Fabric(**TWO_RANKS, precision=f"bnb-{mode}")
    fabric.launch()
    return fabric


def set_up(mode, way):
    fabric = launched(mode)
    if way == "inside":
        with fabric.init_module():
            module = Model(seed=fabric.global_rank)
    elif way == "empty":
        with fabric.init_module(empty_init=True):
            module = Model(seed=fabric.global_rank)
        module.load_state_dict(Model(seed=fabric.global_rank).state_dict())
    else:
        module = Model(seed=fabric.global_rank)
    return state(fabric.setup(module))


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("way", ["before", "inside", "empty"])
def test_ranks_that_start_apart_end_with_rank_zeros_bits(workers, mode, way):
    first, second = workers(2).run(set_up, mode, way)
    assert equal(first, second)
    if way == "before":
        alone = Fabric(accelerator="cpu", devices=1, precision=f"bnb-{mode}").setup(Model(seed=0))
        assert equal(first, state(alone))


def train(mode, devices):
    """Parameters after some steps, on the same data however many ranks there are."""
    fabric = Fabric(**TWO_RANKS | {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}, precision=mode)
    fabric.launch()
    module = Model(seed=0)
    trained = [module.gain, module.linear.bias] if "training" not in mode else list(module.parameters())
    model, optimizer = fabric.setup(module, torch.optim.SGD(trained, lr=0.1))
    data = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(3))
    for x in data:
        x = x.chunk(devices)[fabric.global_rank]
        loss = (model(x) - x[:, :32]).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    return {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("mode", "tolerance"), [("nf4", 2e-2), ("int8", 2e-3), ("int8-training", 2e-3)])
def test_what_is_trained_around_the_layers_is_as_on_one_device(workers, mode, tolerance):
    first, second = workers(2).run(train, f"bnb-{mode}", 2)
    alone = train(f"bnb-{mode}", 1)
    assert equal(first, second)
    assert not (first["gain"] == 1).any()
    for name in alone:  # the sums of gradients are rounded at other places
        torch.testing.assert_close(*map(torch.from_numpy, (first[name], alone[name])), rtol=0, atol=tolerance)


def save_and_load(path, mode):
    fabric = launched(mode)
    saved = fabric.setup(Model(seed=fabric.global_rank))
    fabric.save(path, {"model": saved})
    loaded = fabric.setup(Model(seed=5 + fabric.global_rank))
    fabric.load(path, {"model": loaded})
    return state(saved), state(loaded)


@pytest.mark.parametrize("mode", FROZEN)
def test_a_checkpoint_comes_back_on_all_ranks(workers, tmp_path, mode):
    (saved, loaded), (saved_by_other, loaded_by_other) = workers(2).run(save_and_load, str(tmp_path / "x.ckpt"), mode)
    assert equal(saved, saved_by_other)
    assert equal(saved, loaded)
    assert equal(saved, loaded_by_other)


def build_differently(mode):
    fabric = launched(mode)
    try:
        fabric.setup(nn.Linear(64, 32 + fabric.global_rank))
    except RuntimeError as error:
        return str(error)


def test_ranks_that_build_different_layers_are_told_so_together(workers):
    assert all("is not the same on all ranks" in message for message in workers(2).run(build_differently, "nf4"))


def one_alone(mode):
    if dist.get_rank():
        return None
    fabric = Fabric(accelerator="cpu", devices=1, strategy="auto", precision=f"bnb-{mode}")
    return fabric.setup(Model(seed=0)).linear.is_quantized


def test_a_process_on_its_own_waits_for_nobody(workers):
    assert workers(2).run(one_alone, "nf4", timeout=20) == [True, None]


def save_sharded(path):
    fabric = Fabric(**TWO_RANKS | {"strategy": "fsdp"})
    fabric.launch()
    model = fabric.setup_module(Model(seed=1))
    fabric.save(path, {"model": model})


@pytest.mark.parametrize("mode", FROZEN)
def test_a_sharded_checkpoint_in_floating_point_is_quantized_while_it_is_loaded(workers, tmp_path, mode):
    workers(2).run(save_sharded, str(tmp_path / "sharded"))
    fabric = Fabric(accelerator="cpu", devices=1, precision=f"bnb-{mode}")
    model = fabric.setup(Model(seed=2))
    fabric.load(tmp_path / "sharded", {"model": model})
    assert equal(state(model), state(fabric.setup(Model(seed=1))))
