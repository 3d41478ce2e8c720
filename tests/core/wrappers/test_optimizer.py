"""The wrapped optimizer: the user's optimizer in every respect but where ``step`` goes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from fabric_core import Fabric
from fabric_core.strategies import SingleDeviceStrategy
from fabric_core.wrappers import FabricOptimizer


def prepared(optimizer=SGD, **options):
    fabric = Fabric(accelerator="cpu", devices=1)
    module = nn.Linear(2, 1)
    return fabric.setup(module, optimizer(module.parameters(), lr=0.1, **options))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_it_is_an_instance_of_what_it_wraps():
    _, optimizer = prepared(Adam)
    assert isinstance(optimizer, Adam)
    assert isinstance(optimizer, Optimizer)
    assert not isinstance(optimizer, SGD)
    assert type(optimizer) is FabricOptimizer


def test_reads_reach_the_optimizer_inside():
    _, optimizer = prepared(SGD, momentum=0.5)
    assert optimizer.defaults["momentum"] == 0.5
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    with pytest.raises(AttributeError, match="'SGD' object has no attribute 'absent'"):
        optimizer.absent  # noqa: B018


def test_assignments_reach_the_optimizer_inside():
    _, optimizer = prepared()
    groups = [{**optimizer.param_groups[0], "lr": 7.0}]
    optimizer.param_groups = groups
    assert optimizer.optimizer.param_groups is groups
    optimizer.note = "mine"
    assert optimizer.optimizer.note == "mine"
    del optimizer.note
    assert not hasattr(optimizer.optimizer, "note")


def test_a_learning_rate_set_through_the_wrapper_is_used():
    model, optimizer = prepared()
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.weight.clone()
    step(model, optimizer)
    assert torch.equal(before, model.weight)


def test_parameters_can_be_added():
    _, optimizer = prepared()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.optimizer.param_groups) == 2


def test_gradients_are_cleared_to_nothing_or_to_zero():
    model, optimizer = prepared()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert model.weight.grad.tolist() == [[0.0, 0.0]]
    optimizer.zero_grad()
    assert model.weight.grad is None


def test_the_state_is_the_optimizers():
    model, optimizer = prepared(Adam)
    step(model, optimizer)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    _, other = prepared(Adam)
    other.load_state_dict(state)
    assert other.optimizer.state_dict()["state"][0]["step"] == 1


def test_the_state_comes_through_the_strategy():
    class Gathering(SingleDeviceStrategy):
        def get_optimizer_state(self, optimizer):
            return {"gathered": type(optimizer).__name__}

    module = nn.Linear(2, 1)
    fabric = Fabric(accelerator="cpu", devices=1, strategy=Gathering())
    _, optimizer = fabric.setup(module, SGD(module.parameters()))
    assert optimizer.state_dict() == {"gathered": "SGD"}


def test_a_sharded_optimizer_is_gathered_before_its_state_is_read():
    class Sharded(SGD):
        gathered = False

        def consolidate_state_dict(self):
            self.gathered = True

    _, optimizer = prepared(Sharded)
    assert "param_groups" in optimizer.state_dict()
    assert optimizer.gathered


def test_step_returns_what_the_closure_returned():
    model, optimizer = prepared()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    expected = model(torch.ones(1, 2)).sum().item()
    assert optimizer.step(closure).item() == expected
    assert optimizer.step() is None


def test_lbfgs_evaluates_its_closure_several_times():
    model, optimizer = prepared(torch.optim.LBFGS, max_iter=5)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 2)) - 3).pow(2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert len(calls) > 1
    assert (model(torch.ones(1, 2)) - 3).pow(2).sum().item() < first


def test_the_strategy_may_step_something_else():
    class Engine:
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return "stepped"

    class Engined(SingleDeviceStrategy):
        engine = Engine()

        def step_target(self, optimizer):
            return self.engine

    module = nn.Linear(2, 1)
    _, optimizer = Fabric(accelerator="cpu", devices=1, strategy=Engined()).setup(module, SGD(module.parameters()))
    assert optimizer.step() == "stepped"
    assert Engined.engine.steps == 1


def test_the_precision_steps_where_it_wants_to(fake_backend):
    fabric = Fabric(accelerator="cpu", devices=1, precision="fake")
    module = nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=1.0))
    before = model.weight.clone()
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    assert "optimizer_step" in fabric.strategy.precision.calls
    assert torch.allclose(before - model.weight, torch.ones(1, 2, dtype=torch.float64))


def test_hooks_registered_through_the_wrapper_run():
    model, optimizer = prepared()
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    step(model, optimizer)
    assert order == ["before", "after"]


def test_pickling_keeps_state_and_wrapper():
    model, optimizer = prepared(Adam)
    step(model, optimizer)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert type(twin) is FabricOptimizer
    assert isinstance(twin, Adam)
    assert twin.state_dict()["state"][0]["step"] == 1


def test_model_and_optimizer_pickled_together_stay_together():
    model, optimizer = pickle.loads(pickle.dumps(prepared()))
    before = model.weight.clone()
    step(model, optimizer)
    assert not torch.equal(before, model.weight)


def test_a_copy_is_independent():
    model, optimizer = prepared(Adam)
    step(model, optimizer)
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["lr"] = 5.0
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert type(twin) is FabricOptimizer


def test_it_shows_what_it_is():
    assert repr(prepared()[1]).startswith("FabricSGD (")


def test_an_optimizer_of_ones_own_needs_no_base_class():
    class Plain:
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]
            self.steps = 0

        def step(self):
            self.steps += 1

        def zero_grad(self):
            pass

        def state_dict(self):
            return {"steps": self.steps}

    module = nn.Linear(2, 1)
    _, optimizer = Fabric(accelerator="cpu", devices=1).setup(module, Plain(module.parameters()))
    optimizer.step()
    assert optimizer.state_dict() == {"steps": 1}


class Keeping(SingleDeviceStrategy):
    """Keeps gradients beside the optimizer, as strategies with engines do."""

    cleared: list[tuple[Optimizer, bool]]

    def zero_grad(self, optimizer, set_to_none=True):
        self.cleared.append((optimizer, set_to_none))


def test_clearing_gradients_goes_through_a_strategy_that_keeps_them():
    strategy = Keeping("cpu")
    strategy.cleared = []
    module = nn.Linear(2, 1)
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    model, optimizer = fabric.setup(module, SGD(module.parameters(), lr=0.1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert strategy.cleared == [(optimizer.optimizer, False)]
    assert module.weight.grad is not None


def test_a_strategy_clears_what_the_optimizer_clears_if_it_says_nothing_else():
    module = nn.Linear(2, 1)
    module(torch.ones(1, 2)).sum().backward()
    SingleDeviceStrategy("cpu").zero_grad(SGD(module.parameters(), lr=0.1), set_to_none=False)
    assert module.weight.grad.tolist() == [[0.0, 0.0]]


def test_every_attribute_of_the_cover_is_its_own():
    cover = FabricOptimizer(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1), SingleDeviceStrategy("cpu"))
    assert set(vars(cover)) <= FabricOptimizer._OWN
