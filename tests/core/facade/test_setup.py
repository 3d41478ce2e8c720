"""What ``setup``, ``setup_module`` and ``setup_optimizers`` hand back, and what they did to the objects."""

import pickle

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.strategies import SingleDeviceStrategy
from fabric_core.warnings import PossibleUserWarning
from fabric_core.wrappers import FabricModule, FabricOptimizer, is_wrapped


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def test_a_module_alone_comes_back_alone():
    wrapped = cpu().setup(nn.Linear(2, 1))
    assert type(wrapped) is FabricModule
    assert is_wrapped(wrapped)


def test_a_module_with_optimizers_comes_back_as_a_tuple_in_order():
    module = nn.Linear(2, 1)
    first, second = sgd(module), torch.optim.Adam(module.parameters())
    wrapped, one, two = cpu().setup(module, first, second)
    assert wrapped.module is module
    assert (one.optimizer, two.optimizer) == (first, second)


def test_one_optimizer_still_makes_a_tuple():
    module = nn.Linear(2, 1)
    result = cpu().setup(module, sgd(module))
    assert isinstance(result, tuple)
    assert len(result) == 2


def test_a_scheduler_comes_last_and_as_it_was():
    module = nn.Linear(2, 1)
    optimizer = sgd(module)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    result = cpu().setup(module, optimizer, scheduler=scheduler)
    assert len(result) == 3
    assert result[2] is scheduler


def test_the_strategy_may_replace_the_scheduler():
    class Replacing(SingleDeviceStrategy):
        def setup_module_and_optimizers(self, module, optimizers, scheduler=None):
            return module, optimizers, ("replaced", scheduler)

    module = nn.Linear(2, 1)
    *_, scheduler = cpu(strategy=Replacing()).setup(module, sgd(module), scheduler="mine")
    assert scheduler == ("replaced", "mine")


def test_setup_keeps_the_parameters_of_the_optimizer():
    module = nn.Linear(2, 1)
    wrapped, optimizer = cpu().setup(module, sgd(module))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], wrapped.parameters(), strict=True))


def test_setup_optimizers_returns_one_or_a_tuple():
    fabric, module = cpu(), nn.Linear(2, 1)
    fabric.setup_module(module)
    assert type(fabric.setup_optimizers(sgd(module))) is FabricOptimizer
    two = fabric.setup_optimizers(sgd(module), sgd(module))
    assert isinstance(two, tuple)
    assert [type(each) for each in two] == [FabricOptimizer, FabricOptimizer]


def test_a_frozen_module_can_be_set_up():
    module = nn.Linear(2, 1).requires_grad_(False)
    assert cpu().setup(module)(torch.ones(1, 2)).requires_grad is False


def test_several_models_of_one_fabric_train_independently():
    fabric = cpu()
    a, b = nn.Linear(2, 1), nn.Linear(1, 1)
    a, a_opt = fabric.setup(a, sgd(a))
    b, b_opt = fabric.setup(b, sgd(b))
    before = b.weight.clone()
    fabric.backward(a(torch.ones(1, 2)).sum())
    a_opt.step()
    assert torch.equal(b.weight, before)
    fabric.backward(b(torch.ones(1, 1)).sum(), model=b)
    b_opt.step()
    assert not torch.equal(b.weight, before)


def test_the_device_of_the_wrapped_module_is_the_fabrics():
    fabric = cpu()
    assert fabric.setup(nn.Linear(2, 1)).device == fabric.device == torch.device("cpu")


def test_setup_moves_the_module_to_the_device():
    class Meta(SingleDeviceStrategy):
        root_device = torch.device("meta")

        def setup_environment(self):
            pass

        def module_to_device(self, module):
            module.to("meta")

    fabric = cpu(strategy=Meta())
    assert fabric.setup(nn.Linear(2, 1)).weight.device.type == "meta"
    assert fabric.setup(nn.Linear(2, 1), move_to_device=False).weight.device.type == "cpu"


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.here = nn.Linear(2, 1)
        self.there = nn.Linear(2, 1, device="meta")


class Forgiving(SingleDeviceStrategy):
    def module_to_device(self, module):
        pass


def test_parameters_on_several_devices_are_pointed_out():
    with pytest.warns(PossibleUserWarning, match=r"2 on cpu \(such as 'here.weight'\), 2 on meta \(such as 'there"):
        cpu(strategy=Forgiving()).setup(Split())


def test_parameters_on_several_devices_are_fine_if_nothing_moves():
    cpu(strategy=Forgiving()).setup(Split(), move_to_device=False)


def test_an_optimizer_over_meta_parameters_is_refused_with_the_right_order():
    module = nn.Linear(2, 1, device="meta")
    for call in (lambda f: f.setup(module, sgd(module)), lambda f: f.setup_optimizers(sgd(module))):
        with pytest.raises(RuntimeError, match="Set up the module first, then create the optimizer"):
            call(cpu())


class Joint(SingleDeviceStrategy):
    setup_mode = "joint"


class Separate(SingleDeviceStrategy):
    setup_mode = "separate"


def test_a_joint_strategy_refuses_optimizers_alone():
    with pytest.raises(RuntimeError, match="sets up module and optimizer together"):
        cpu(strategy=Joint()).setup_optimizers(sgd(nn.Linear(2, 1)))


def test_a_sharding_strategy_refuses_optimizers_that_came_first():
    module = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match=r"fabric\.setup_module\(model\) first"):
        cpu(strategy=Separate()).setup(module, sgd(module))


def test_both_setups_tell_the_callbacks():
    class Listener:
        def __init__(self):
            self.heard = []

        def on_after_setup(self, fabric, module):
            self.heard.append((fabric, module))

    listener = Listener()
    fabric = cpu(callbacks=listener)
    modules = [fabric.setup(nn.Linear(2, 1)), fabric.setup_module(nn.Linear(2, 1))]
    assert [module for _, module in listener.heard] == modules
    assert all(heard is fabric for heard, _ in listener.heard)


class Bound(nn.Linear):
    """Follows the protocol of modules that want to know who runs them."""

    _fabric = None

    def __init__(self):
        super().__init__(2, 1)
        self.seen = []

    def on_train_start(self, **kwargs):
        self.seen.append(kwargs)


def test_a_module_that_asks_is_told_who_runs_it():
    module, fabric = Bound(), cpu()
    _, optimizer = fabric.setup(module, sgd(module))
    assert module._fabric is fabric
    assert module._fabric_optimizers[0] is optimizer


def test_a_module_that_asks_becomes_a_callback_once():
    module, fabric = Bound(), cpu()
    fabric.setup(module)
    fabric.setup_module(module)
    fabric.call("on_train_start", epoch=3)
    assert module.seen == [{"epoch": 3}]


def test_a_module_that_does_not_ask_is_left_alone():
    module = nn.Linear(2, 1)
    fabric = cpu()
    fabric.setup(module)
    assert not hasattr(module, "_fabric")
    assert fabric.callbacks == []


def test_a_fabric_survives_pickling():
    fabric = cpu(precision="bf16-mixed")
    copy = pickle.loads(pickle.dumps(fabric))
    assert copy.plan.as_dict() == fabric.plan.as_dict()
    assert copy.strategy is copy.plan.strategy.value
    assert copy.setup(nn.Linear(2, 1))(torch.ones(1, 2)).dtype == torch.float32


def test_a_pickled_fabric_keeps_callbacks():
    fabric = cpu(callbacks=["a callback"])
    assert pickle.loads(pickle.dumps(fabric)).callbacks == ["a callback"]
