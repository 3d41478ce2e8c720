"""Learning-rate schedulers on a wrapped optimizer, as on a bare one: any warning is an error here."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from fabric_core import Fabric

# What SequentialLR of torch 2.6 says of itself, on a bare optimizer too.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

KINDS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.5**epoch),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=1, gamma=0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=1.0, total_steps=5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=2),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


def optimizer_over(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def rates(optimizer, scheduler, model, steps=4):
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def wrapped():
    module = nn.Linear(2, 1)
    return Fabric(accelerator="cpu", devices=1).setup(module, optimizer_over(module))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_scheduler_on_the_wrapper_does_as_on_the_bare_optimizer(make):
    module = nn.Linear(2, 1)
    bare = optimizer_over(module)
    expected = rates(bare, make(bare), module)
    model, optimizer = wrapped()
    scheduler = make(optimizer)
    assert rates(optimizer, scheduler, model) == expected
    assert optimizer.optimizer.param_groups[0]["lr"] == expected[-1]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_scheduler_made_before_setup_steps_on(make):
    module = nn.Linear(2, 1)
    bare = optimizer_over(module)
    scheduler = make(bare)
    model, optimizer = Fabric(accelerator="cpu", devices=1).setup(module, bare)
    assert len(set(rates(optimizer, scheduler, model))) > 1


def test_a_scheduler_stepped_too_early_is_still_noticed():
    _, optimizer = wrapped()
    scheduler = schedulers.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before"):
        scheduler.step()


def test_two_schedulers_share_an_optimizer():
    model, optimizer = wrapped()
    first, second = schedulers.ExponentialLR(optimizer, 0.5), schedulers.ExponentialLR(optimizer, 0.1)
    rates(optimizer, first, model, steps=1)
    second.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_a_scheduler_on_the_wrapper_is_restored():
    model, optimizer = wrapped()
    scheduler = schedulers.StepLR(optimizer, 1, gamma=0.5)
    rates(optimizer, scheduler, model)
    _, other = wrapped()
    restored = schedulers.StepLR(other, 1, gamma=0.5)
    restored.load_state_dict(scheduler.state_dict())
    assert restored.get_last_lr() == scheduler.get_last_lr()


def test_an_optimizer_with_a_scheduler_copies_and_pickles():
    model, optimizer = wrapped()
    rates(optimizer, schedulers.StepLR(optimizer, 1), model, steps=1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.step()
        assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_callbacks_hear_of_steps_under_a_scheduler():
    class Listener:
        def on_after_optimizer_step(self, strategy, optimizer):
            heard.append(optimizer)

    heard = []
    module = nn.Linear(2, 1)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=Listener())
    model, optimizer = fabric.setup(module, optimizer_over(module))
    rates(optimizer, schedulers.StepLR(optimizer, 1), model, steps=3)
    assert len(heard) == 3
