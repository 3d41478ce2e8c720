"""Building models under ``init_module``: split at once at stage 3, with the values they would have anyway."""

import pytest
import torch
from deepspeed_network import INPUTS, OUTPUTS, batches, gathered, launched, message, network, whole
from torch import nn

from fabric_core.precision.casting import DefaultDtype


def built(stage, precision, empty_init):
    """A model's dtype, whether it is split, how far it is from one built plainly, and its losses."""
    fabric = launched(stage, precision=precision)
    with fabric.init_module(empty_init=empty_init):
        module = network()
    split = all(hasattr(parameter, "ds_id") for parameter in module.parameters())
    dtype = module[0].weight.dtype
    with DefaultDtype(dtype):  # random numbers depend on it
        plain = whole(network())
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.01))
    found = whole(module)
    apart = max((found[name] - plain[name]).abs().max().item() for name in plain)
    losses = []
    for x, y in batches(3, fabric.global_rank, 2):
        loss = (model(x) - y).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    fabric.teardown()
    return split, str(dtype), apart, losses


@pytest.mark.parametrize("empty_init", [None, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_values_are_those_of_a_plain_model_and_survive_set_up(stage, precision, empty_init, workers):
    for split, dtype, apart, losses in workers(2).run(built, stage, precision, empty_init):
        assert split == (stage == 3)
        half = precision == "bf16-true" or (stage == 3 and precision == "bf16-mixed")
        assert dtype == ("torch.bfloat16" if half else "torch.float32")
        assert apart <= (2e-3 if precision == "bf16-mixed" and stage < 3 else 0.0)  # set-up rounds them
        assert losses[2] < losses[0]


def empty(stage):
    """What layers and plain tensors hold that are built without initialisation."""
    fabric = launched(stage)
    torch.nn.init.ones_(probe := torch.zeros(2))
    with fabric.init_module(empty_init=True):
        module = nn.Linear(64, 64)
        torch.nn.init.ones_(skipped := torch.zeros(2))
    with gathered(module):
        shape = tuple(module.weight.shape)
    fabric.teardown()
    return probe.tolist(), skipped.tolist(), shape


@pytest.mark.parametrize("stage", [1, 3])
def test_empty_init_draws_no_weights(stage, workers):
    assert workers(2).run(empty, stage) == [([1.0, 1.0], [0.0, 0.0], (64, 64))] * 2


def seeds():
    """Each rank builds from another seed; the weights that both hold afterwards."""
    fabric = launched(3)
    with fabric.init_module():
        module = network(seed=5 + fabric.global_rank)
    same = whole(module)["0.weight"].equal(whole(network(seed=5))["0.weight"])
    fabric.teardown()
    return same


def test_ranks_that_build_differently_get_the_values_of_rank_zero(workers):
    assert workers(2).run(seeds) == [True, True]


PATCHED = ("empty", "zeros", "ones", "full", "tensor", "arange", "eye", "randn")


def functions():
    """What ``zero.Init`` replaces while it is entered."""
    module = nn.Module
    return [
        torch.Tensor.__new__,
        nn.Linear.__init__,
        nn.Sequential.__init__,
        module.apply,
        module.__init_subclass__,
        *(getattr(torch, name) for name in PATCHED),
    ]


def failing(stage):
    fabric = launched(stage)
    before, linear = functions(), torch.nn.functional.linear

    def build():
        with fabric.init_module():
            nn.Linear(2, 2)
            assert stage != 3 or functions() != before
            raise ValueError("in the middle of building")

    text = message(build)
    restored = functions() == before
    plain = nn.Linear(2, 2)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters()))
    fabric.backward(model(torch.ones(2, INPUTS)).sum())
    optimizer.step()
    fabric.teardown()
    return text, restored, hasattr(plain.weight, "ds_id"), torch.nn.functional.linear is linear


@pytest.mark.parametrize("stage", [1, 3])
def test_building_that_fails_leaves_torch_as_it_was(stage, workers):
    for text, restored, split, same_linear in workers(2).run(failing, stage):
        assert text == "ValueError: in the middle of building"
        assert restored
        assert not split
        assert same_linear


class Redrawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(INPUTS, OUTPUTS)
        self.extra = nn.Parameter(torch.full((3,), 2.0))
        self.apply(self.redraw)

    @staticmethod
    def redraw(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 7.0)


def redrawn():
    fabric = launched(3)
    with fabric.init_module():
        module = Redrawing()
    found = whole(module)
    fabric.teardown()
    return found["inner.weight"].unique().tolist(), found["extra"].tolist()


def test_apply_reaches_weights_that_are_split_already(workers):
    assert workers(2).run(redrawn) == [([7.0], [2.0] * 3)] * 2


def too_early():
    from fabric_core import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_3")
    return message(fabric.init_module)


def test_building_needs_the_other_processes(workers):
    for text in workers(2).run(too_early):
        assert text.startswith("UsageError: ")
        assert "fabric.launch()" in text
