"""Which dtype parameters, inputs, compute and outputs have under each name, on the CPU."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Probe(nn.Module):
    """Writes down the dtypes that forward sees."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("index", torch.zeros(1, dtype=torch.int64))

    def forward(self, x, mask=None):
        self.seen = {"input": x.dtype, "compute": self.layer(x).dtype, "made": torch.zeros(1).dtype}
        if mask is not None:
            self.seen["mask"] = mask.dtype
        return self.layer(x)


#             parameters, input, compute, made in forward
NAMES = {
    "32-true": (F32, F32, F32, F32),
    "64-true": (F64, F64, F64, F64),
    "16-true": (F16, F16, F16, F16),
    "bf16-true": (BF16, BF16, BF16, BF16),
    "bf16-mixed": (F32, F32, BF16, F32),
}


def setup(precision):
    return Fabric(accelerator="cpu", devices=1, precision=precision).setup(Probe())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_buffers(name):
    model = setup(name)
    assert model.layer.weight.dtype == model.scale.dtype == NAMES[name][0]
    assert model.index.dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_what_forward_sees(name):
    model = setup(name)
    model(torch.ones(1, 2))
    _, given, compute, made = NAMES[name]
    assert model.seen == {"input": given, "compute": compute, "made": made}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_come_back_in_the_default_dtype(name):
    assert setup(name)(torch.ones(1, 2)).dtype == F32


@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_parameters_dtype(name):
    model = setup(name)
    model(torch.ones(1, 2)).sum().backward()
    assert model.layer.weight.grad.dtype == NAMES[name][0]


@pytest.mark.parametrize("name", NAMES)
def test_keywords_are_converted_and_integers_are_not(name):
    model = setup(name)
    model(torch.ones(1, 2), mask=torch.ones(1))
    assert model.seen["mask"] == NAMES[name][1]
    model(torch.ones(1, 2), mask=torch.ones(1, dtype=torch.bool))
    assert model.seen["mask"] == torch.bool


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_forward_leaves_the_default_dtype(name):
    with pytest.raises(RuntimeError):
        setup(name)(torch.ones(1, 3))
    assert torch.get_default_dtype() == F32


@pytest.mark.parametrize("name", NAMES)
def test_plain_numbers_and_texts_pass(name):
    class Echo(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    model = Fabric(accelerator="cpu", devices=1, precision=name).setup(Echo())
    assert model(1, "a", None, key=2.5) == ((1, "a", None), {"key": 2.5})


def test_doubles_arrive_as_singles_under_mixed_precision():
    model = setup("bf16-mixed")
    model(torch.ones(1, 2, dtype=F64))
    assert model.seen["input"] == F32


def test_single_precision_leaves_doubles_alone():
    class Echo(nn.Module):
        def forward(self, x):
            return x

    model = Fabric(accelerator="cpu", devices=1).setup(Echo())
    assert model(torch.ones(1, dtype=F64)).dtype == F64


def test_training_in_double_precision_is_exact():
    model = setup("64-true")
    x = torch.full((1, 2), 1 / 3, dtype=F64)
    expected = nn.functional.linear(x, model.layer.weight, model.layer.bias)
    assert torch.equal(model.module.layer(x), expected)


COMPUTE = {
    Precision: ((), F32, "32-true"),
    DoublePrecision: ((), F64, "64-true"),
    HalfPrecision: (("bf16-true",), BF16, "bf16-true"),
    MixedPrecision: (("bf16-mixed",), BF16, "bf16-mixed"),
}


@pytest.mark.parametrize("cls", COMPUTE, ids=lambda c: c.__name__)
def test_each_says_its_name_and_the_dtype_it_computes_in(cls):
    arguments, dtype, name = COMPUTE[cls]
    precision = cls(*arguments)
    assert (precision.compute_dtype, precision.precision) == (dtype, name)


def test_half_precision_is_float16_unless_told_otherwise():
    assert HalfPrecision().precision == "16-true"
    with pytest.raises(ValueError, match="expected one of"):
        HalfPrecision("16-mixed")


@pytest.mark.parametrize("name", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_precisions_without_a_scaler_have_no_state(name):
    precision = Fabric(accelerator="cpu", devices=1, precision=name).strategy.precision
    assert precision.state_dict() == {}
    precision.load_state_dict({})
    assert not precision.changes_backward
    assert not precision.changes_step
