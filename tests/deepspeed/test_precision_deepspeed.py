"""What DeepSpeed makes of the names of precisions."""

import pytest
import torch
from deepspeed_network import INPUTS, half_on_cpu, launched, message
from torch import nn

from fabric_core.precision import MixedPrecision
from fabric_deepspeed import DeepSpeedPrecision

NAMES = ["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]
HALVES = [("16-true", torch.float16), ("bf16-true", torch.bfloat16)]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_its_dtype(name):
    precision = DeepSpeedPrecision(name)
    assert precision.precision == name
    dtypes = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
    assert precision.compute_dtype is dtypes[name.partition("-")[0]]
    assert precision.changes_forward == (name != "32-true")


def test_the_class_methods_are_the_names_that_are_registered():
    made = [DeepSpeedPrecision.float16(), DeepSpeedPrecision.bfloat16()]
    made += [DeepSpeedPrecision.mixed_float16(), DeepSpeedPrecision.mixed_bfloat16()]
    assert [one.precision for one in made] == NAMES[1:]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"'64-true'.*'bf16-mixed'"):
        DeepSpeedPrecision("64-true")


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_true_turns_module_and_new_tensors_to_16_bits(name, dtype):
    precision = DeepSpeedPrecision(name)
    module = precision.convert_module(nn.BatchNorm1d(2))
    assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype, torch.int64}
    with precision.tensor_init_context():
        assert torch.zeros(1).dtype is dtype
    with precision.module_init_context():
        assert nn.Linear(1, 1).weight.dtype is dtype
    assert torch.zeros(1).dtype is torch.float32


@pytest.mark.parametrize("name", ["32-true", "16-mixed", "bf16-mixed"])
def test_others_leave_module_and_new_tensors_in_single_precision(name):
    precision = DeepSpeedPrecision(name)
    assert precision.convert_module(nn.Linear(1, 1)).weight.dtype is torch.float32
    with precision.tensor_init_context(), precision.module_init_context():
        assert nn.Linear(1, 1).weight.dtype is torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_inputs_get_the_dtype_of_compute_and_outputs_come_back(name):
    precision = DeepSpeedPrecision(name)
    given = {"x": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}
    inside = precision.convert_input(given)
    assert inside["x"].dtype is precision.compute_dtype
    assert inside["n"] is given["n"]
    with precision.forward_context():
        assert torch.zeros(1).dtype is precision.compute_dtype
    assert precision.convert_output(inside)["x"].dtype is torch.float32


class Watching(nn.Module):
    """Notes the dtypes that its forward sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.seen = nn.Linear(INPUTS, 2), []
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        self.seen = [str(one.dtype) for one in (x, self.linear.weight, torch.zeros(1))]
        return self.linear(x) * self.scale.to(x.dtype)


def trained(stage, precision):
    fabric = launched(stage, precision=precision)
    module = Watching()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.1))
    output = model(torch.ones(2, INPUTS))
    fabric.backward(output.square().mean())
    optimizer.step()
    moments = {str(state["exp_avg"].dtype) for state in optimizer.state.values()}
    fabric.teardown()
    return module.seen, str(output.dtype), moments, str(module.scale.dtype)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compute_in_16_bits_and_updates_in_32(stage, precision, workers):
    for seen, output, moments, buffer in workers(2).run(trained, stage, precision):
        assert seen == ["torch.bfloat16"] * 3
        assert output == "torch.float32"
        assert moments == {"torch.float32"}
        assert buffer == ("torch.bfloat16" if precision == "bf16-true" else "torch.float32")


def with_another_precision():
    from fabric_core import Fabric

    precision = MixedPrecision("bf16-mixed", "cpu")
    fabric = Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_1", plugins=[precision])
    return message(fabric.launch)


def test_a_precision_that_casts_by_itself_is_refused(workers):
    for text in workers(2).run(with_another_precision):
        assert text.startswith("InvalidTypeError: ")
        assert "MixedPrecision" in text
        assert 'precision="bf16-mixed"' in text


def half_where_there_is_none():
    return half_on_cpu() or message(launched, 1, precision="16-true")


def test_a_dtype_that_the_device_lacks_is_told_at_launch(workers):
    for text in workers(2).run(half_where_there_is_none):
        if text is True:
            pytest.skip("this processor computes in float16")
        assert text.startswith("UnsupportedError: ")
        assert "torch.float16 on this cpu device" in text
        assert "bf16-true" in text


def float16(stage):
    """Parameters after some steps of SGD, clipped, with a loss scale; and those of float32 under ddp."""
    from deepspeed_network import apart, batches, network, whole

    from fabric_deepspeed import DeepSpeedStrategy

    ends = []
    for strategy, precision in (("ddp", "32-true"), (DeepSpeedStrategy(stage=stage, initial_scale_power=8), "16-true")):
        fabric = launched(strategy, precision=precision)
        module = network()
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for x, y in batches(6, fabric.global_rank, 2):
            fabric.backward((model(x) - y).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(whole(module))
        fabric.teardown()
    return apart(*ends)


@pytest.mark.skipif(not half_on_cpu(), reason="this processor has no float16 arithmetic")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_float16_steps_have_their_true_size(stage, workers):
    assert max(workers(2).run(float16, stage)) <= 5e-3
