"""Optimizer state by name: what the names are, and that whatever has the names gets its state."""

import copy

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.checkpoint.portable import clean_keys, names_of, portable_optimizer_state
from fabric_core.errors import CheckpointError, CheckpointKeyError


class Tied(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.second(self.first(x)) * self.frozen


def trained(module, kind=torch.optim.AdamW, steps=2, parameters=None, **options):
    optimizer = kind(list(module.parameters()) if parameters is None else parameters, **{"lr": 0.01, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.ckpt"


def test_names_are_those_of_the_modules_state():
    module = Tied()
    names = list(names_of(trained(module), {"model": module}).values())
    assert names == ["frozen", "first.weight", "first.bias"]
    assert set(names) <= module.state_dict().keys()


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(checkpoint_wrapper(module))


def compiled(module):
    return nn.Sequential(torch.compile(module, backend="eager"))


@pytest.mark.parametrize("wrap", [checkpointed, compiled, lambda module: nn.DataParallel(nn.Sequential(module))])
def test_wrappers_do_not_show_in_names(wrap):
    module = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1)
    assert list(names_of(optimizer, {"model": wrap(module)}).values()) == ["0.weight", "0.bias"]


def test_an_optimizer_over_several_modules_has_their_names_in_its_own():
    one, two = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=1)
    names = names_of(optimizer, {"one": one, "two": two})
    assert list(names.values()) == ["one.weight", "one.bias", "two.weight"]


def test_the_first_module_that_holds_all_parameters_gives_the_names():
    inner = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(inner.parameters(), lr=1)
    assert list(
        names_of(optimizer, {"other": nn.Linear(1, 1), "outer": nn.Sequential(inner), "inner": inner}).values()
    ) == [
        "0.weight",
        "0.bias",
    ]


def test_parameters_of_no_module_are_an_error_that_says_what_to_add():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    with pytest.raises(CheckpointError, match=r'2 of its 2 parameters are in no module.*"model": model'):
        names_of(optimizer, {"model": nn.Linear(1, 1)})


def test_state_and_groups_are_by_name_and_the_tensors_are_the_optimizers():
    module = Tied()
    optimizer = trained(module)
    portable = portable_optimizer_state(optimizer, {"model": module})
    assert portable["param_groups"][0]["params"] == ["frozen", "first.weight", "first.bias"]
    assert portable["state"].keys() == {"first.weight", "first.bias"}
    assert portable["state"]["first.weight"]["exp_avg"] is optimizer.state[module.first.weight]["exp_avg"]


def save_by_name(path, module, optimizer, **more):
    portable = portable_optimizer_state(optimizer, {"model": module})
    torch.save({"model": module.state_dict(), "optimizer": portable, **more}, path)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "NAdam", "Adafactor", "LBFGS"])
def test_every_optimizers_state_comes_back(fabric, path, kind, steps):
    def make(seed, steps):
        module = Tied(seed)
        optimizer = getattr(torch.optim, kind)(
            module.parameters(), lr=0.01, **({"momentum": 0.9} if kind == "SGD" else {})
        )
        x = torch.arange(6.0).reshape(2, 3)

        def closure():
            optimizer.zero_grad()
            loss = module(x).square().sum()
            loss.backward()
            return loss

        return module, optimizer, [optimizer.step(closure).item() for _ in range(steps)], closure

    module, optimizer, _, closure = make(0, 3)
    save_by_name(path, module, optimizer)
    other, its_optimizer, _, its_closure = make(1, steps)
    fabric.load(path, {"model": other, "optimizer": its_optimizer})
    assert same(its_optimizer.state_dict(), optimizer.state_dict())
    assert its_optimizer.step(its_closure).item() == optimizer.step(closure).item()


def test_the_order_of_parameters_and_groups_may_change(fabric, path):
    module = Tied()
    save_by_name(
        path, module, trained(module, parameters=[{"params": [module.first.weight]}, {"params": [module.first.bias]}])
    )
    other = Tied(1)
    optimizer = torch.optim.AdamW([other.first.bias, other.first.weight])
    fabric.load(path, {"model": other, "optimizer": optimizer})
    assert optimizer.state[other.first.bias]["exp_avg"].shape == (3,)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_groups_of_other_options_cannot_be_merged(fabric, path):
    module = Tied()
    groups = [{"params": [module.first.weight]}, {"params": [module.first.bias], "lr": 0.5}]
    save_by_name(path, module, trained(module, parameters=groups))
    other = Tied(1)
    optimizer = torch.optim.AdamW([other.first.bias, other.first.weight], lr=0.25)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"group 0 of AdamW were in groups \[0, 1\] of different options"):
        fabric.load(path, {"model": other, "optimizer": optimizer})
    assert same(other.state_dict(), before)
    fabric.load(path, {"model": other, "optimizer": optimizer}, strict=False)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.state[other.first.bias]["step"] == 2


def test_all_parameters_that_differ_are_listed_and_nothing_changes(fabric, path):
    module = nn.Linear(3, 3)
    save_by_name(path, module, trained(module, parameters=[module.weight]))
    other = nn.Linear(3, 3)
    optimizer = trained(other, parameters=[other.bias])
    before = copy.deepcopy([other.state_dict(), optimizer.state_dict()])
    with pytest.raises(CheckpointKeyError) as caught:
        fabric.load(path, {"model": other, "optimizer": optimizer})
    assert "Missing in the checkpoint: bias. Unknown to the optimizer: weight." in str(caught.value)
    assert same([other.state_dict(), optimizer.state_dict()], before)


def test_a_parameter_added_later_keeps_its_state_unless_strict(fabric, path):
    module = nn.Linear(3, 3)
    save_by_name(path, module, trained(module, steps=3, parameters=[module.weight]))
    other = nn.Linear(3, 3)
    optimizer = trained(other, steps=1)
    fabric.load(path, {"model": other, "optimizer": optimizer}, strict=False)
    assert optimizer.state[other.weight]["step"] == 3
    assert optimizer.state[other.bias]["step"] == 1


def test_without_modules_to_name_the_parameters_their_order_counts(fabric, path):
    module = nn.Linear(3, 3)
    optimizer = trained(module)
    save_by_name(path, module, optimizer)
    other = trained(nn.Linear(3, 3), steps=0)
    fabric.load(path, {"optimizer": other})
    assert same(other.state_dict(), optimizer.state_dict())


def test_load_raw_takes_state_by_name(fabric, path):
    module = nn.Linear(3, 3)
    optimizer = trained(module)
    torch.save(portable_optimizer_state(optimizer, {"": module}), path)
    other = trained(nn.Linear(3, 3), steps=0)
    fabric.load_raw(path, other)
    assert same(other.state_dict(), optimizer.state_dict())


def test_state_as_torch_flattens_it_is_understood(fabric, path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    module = nn.Linear(3, 3)
    optimizer = trained(module)
    flat = get_optimizer_state_dict(module, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    torch.save({"model": module.state_dict(), "optimizer": flat}, path)
    other = nn.Linear(3, 3)
    its_optimizer = trained(other, steps=0)
    fabric.load(path, {"model": other, "optimizer": its_optimizer})
    assert same(its_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


class Own(torch.optim.SGD):
    """Keeps state of its own, under a key that is no parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state["shared"] = {"calls": 3}


def test_what_an_optimizer_keeps_beside_its_parameters_survives(fabric, path):
    module = nn.Linear(3, 3)
    save_by_name(path, module, Own(module.parameters(), lr=1))
    other = nn.Linear(3, 3)
    optimizer = Own(other.parameters(), lr=1)
    optimizer.state["shared"] = {"calls": 0}
    fabric.load(path, {"model": other, "optimizer": optimizer})
    assert optimizer.state["shared"] == {"calls": 3}


class Loading(torch.optim.SGD):
    def load_state_dict(self, state_dict):
        self.seen = state_dict["param_groups"][0]["params"]
        super().load_state_dict(state_dict)


def test_an_optimizer_that_loads_itself_gets_numbers(fabric, path):
    module = nn.Linear(3, 3)
    save_by_name(path, module, trained(module, torch.optim.SGD, momentum=0.9))
    other = nn.Linear(3, 3)
    optimizer = Loading(other.parameters(), lr=1, momentum=0.9)
    fabric.load(path, {"model": other, "optimizer": optimizer})
    assert optimizer.seen == [0, 1]
    assert optimizer.state[other.weight]["momentum_buffer"].shape == (3, 3)


def test_compiled_parts_neither_show_in_a_checkpoint_nor_matter_for_loading(fabric, path):
    plain, wrapped = nn.Sequential(nn.Linear(3, 3)), compiled(nn.Linear(3, 3))
    fabric.save(path, {"model": wrapped})
    assert torch.load(path)["model"].keys() == {"0.weight", "0.bias"}
    fabric.load(path, {"model": plain})
    assert same(dict(plain.state_dict()), dict(clean_keys(wrapped.state_dict())))
    torch.save({"model": wrapped.state_dict()}, path)  # as others write it
    other = compiled(nn.Linear(3, 3))
    weight = other[0].weight
    fabric.load(path, {"model": other})
    assert other[0].weight is weight
    assert torch.equal(weight, plain[0].weight)


def test_loading_into_parameters_without_memory_is_an_error(fabric, path):
    torch.save({"model": nn.Linear(3, 3).state_dict()}, path)
    with torch.device("meta"):
        module = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match=r"on the meta device, set the module up first.*: weight, bias"):
        fabric.load(path, {"model": module})
