"""The two tools that precisions are made of."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from fabric_core.precision.casting import DefaultDtype, cast_floats

Pair = namedtuple("Pair", "a b")
BF16 = torch.bfloat16


def test_only_floating_point_tensors_change():
    data = {"f": torch.ones(1), "i": torch.ones(1, dtype=torch.int64), "b": torch.ones(1, dtype=torch.bool)}
    result = cast_floats(data, BF16)
    assert [t.dtype for t in result.values()] == [BF16, torch.int64, torch.bool]


def test_complex_tensors_stay():
    tensor = torch.ones(1, dtype=torch.complex64)
    assert cast_floats(tensor, BF16) is tensor


@pytest.mark.parametrize("value", [1, 2.5, "text", True, None, b"bytes"])
def test_other_values_stay(value):
    assert cast_floats(value, BF16) is value


def test_containers_keep_their_type():
    data = Pair([torch.ones(1)], OrderedDict(x=(torch.ones(1), "text")))
    result = cast_floats(data, BF16)
    assert type(result) is Pair
    assert type(result.b) is OrderedDict
    assert result.a[0].dtype == result.b["x"][0].dtype == BF16
    assert result.b["x"][1] == "text"


@pytest.mark.parametrize(
    "data", [torch.ones(1), (torch.ones(1), 2), [torch.ones(1)], {"a": torch.ones(1), "b": [torch.ones(1)]}]
)
def test_what_needs_no_change_is_the_same_object(data):
    assert cast_floats(data, torch.float32) is data


def test_the_callers_containers_are_not_changed():
    data = [torch.ones(1), {"a": torch.ones(1)}]
    cast_floats(data, BF16)
    assert data[0].dtype == data[1]["a"].dtype == torch.float32


def test_gradients_flow_through_a_cast():
    tensor = torch.ones(1, requires_grad=True)
    cast_floats([tensor], BF16)[0].sum().backward()
    assert tensor.grad.item() == 1.0


def test_the_default_dtype_changes_for_a_while():
    with DefaultDtype(torch.float64):
        assert torch.zeros(1).dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32


def test_the_default_dtype_is_back_after_an_error():
    with pytest.raises(KeyError), DefaultDtype(torch.float64):
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


def test_one_object_may_be_entered_inside_itself():
    context = DefaultDtype(torch.float64)
    with context, DefaultDtype(torch.float16), context:
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_what_to_go_back_to_is_read_on_entry():
    context = DefaultDtype(torch.float64)
    torch.set_default_dtype(torch.float16)
    with context:
        pass
    assert torch.get_default_dtype() == torch.float16
