import pytest
import torch
from torch import nn

from fabric_core.errors import InvalidTypeError
from fabric_core.module_init import EmptyInit, has_meta_parameters, materialize_meta, optimizer_to_device

FILLS = [
    lambda t: nn.init.uniform_(t),
    lambda t: nn.init.normal_(t),
    lambda t: nn.init.constant_(tensor=t, val=3),
    lambda t: nn.init.ones_(t),
    lambda t: nn.init.zeros_(t),
    lambda t: nn.init.xavier_uniform_(t),
    lambda t: nn.init.xavier_normal_(t),
    lambda t: nn.init.kaiming_uniform_(t),
    lambda t: nn.init.kaiming_normal_(t),
]


@pytest.mark.parametrize("fill", FILLS)
def test_the_functions_of_torch_return_their_tensor_untouched(fill):
    tensor = torch.full((3, 4), 7.0)
    with EmptyInit():
        assert fill(tensor) is tensor
    assert tensor.eq(7).all()
    fill(tensor)
    assert not tensor.eq(7).all()


@pytest.mark.parametrize("name", ["trunc_normal_", "orthogonal_", "dirac_"])
def test_functions_that_draw_in_several_steps_end_and_return_their_tensor(name):
    tensor = torch.full((3, 4, 5), 7.0)
    with EmptyInit():
        assert getattr(nn.init, name)(tensor) is tensor


def test_other_ways_to_fill_a_tensor_work_inside():
    with EmptyInit():
        assert torch.zeros(2).eq(0).all()
        assert torch.empty(2).fill_(3).eq(3).all()
        assert not torch.empty(2).is_meta
        nn.TransformerEncoderLayer(8, 2)


def test_a_disabled_block_does_nothing():
    with EmptyInit(enabled=False):
        assert nn.init.ones_(torch.zeros(2)).eq(1).all()


def test_initialisation_is_back_after_an_error():
    with pytest.raises(KeyError), EmptyInit():
        raise KeyError
    assert nn.init.ones_(torch.zeros(2)).eq(1).all()


class Buffered(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.register_buffer("count", torch.zeros(2, **kwargs))


def test_meta_parameters_and_buffers_are_found():
    module = nn.Linear(2, 2, device="meta")
    assert has_meta_parameters(nn.Sequential(nn.ReLU(), module))
    assert has_meta_parameters(Buffered(device="meta"))
    assert has_meta_parameters(torch.optim.SGD(module.parameters(), lr=1))
    assert not has_meta_parameters(Buffered())
    assert not has_meta_parameters(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1))


def test_meta_parameters_are_searched_in_modules_and_optimizers_only():
    with pytest.raises(InvalidTypeError, match="got Tensor"):
        has_meta_parameters(torch.zeros(1))


def test_materialised_modules_have_their_initial_values():
    with torch.device("meta"):
        module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.MultiheadAttention(4, 2))
    materialize_meta(module, "cpu")
    assert not has_meta_parameters(module)
    assert module[0].running_var.eq(1).all()
    assert module[1].weight.abs().max() <= 3**-0.5
    assert module[2].in_proj_bias.eq(0).all()


def test_tied_parameters_stay_tied():
    first, second = (nn.Linear(3, 3, device="meta") for _ in range(2))
    second.weight = first.weight
    materialize_meta(nn.Sequential(first, second), "cpu")
    assert second.weight is first.weight


def test_what_has_storage_stays():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    before = module[0].weight
    materialize_meta(module, "cpu")
    assert module[0].weight is before


def test_modules_that_cannot_initialise_themselves_are_all_named_and_nothing_changes():
    module = nn.Sequential(nn.Linear(2, 2, device="meta"), Buffered(device="meta"))
    with pytest.raises(InvalidTypeError, match=r"1 \(Buffered\).*reset_parameters"):
        materialize_meta(module, "cpu")
    assert module[0].weight.is_meta


def test_the_state_of_an_optimizer_moves_except_its_step():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    optimizer.state[parameter]["history"] = [torch.ones(1), 3]
    optimizer_to_device(optimizer, "meta")
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_meta
    assert state["history"][0].is_meta
    assert not state["step"].is_meta
