"""Precision on modules whose parameters are split: dtypes, and a gradient scaler that all ranks agree with."""

import math

import pytest
import torch
from torch import nn

from distributed.small_model import Model, batches, make_strategy, needs_fsdp, whole
from fabric_core import Fabric
from fabric_core.errors import InvalidArgumentError
from fabric_core.precision import FSDPPrecision
from fabric_core.precision.sharded import ShardedGradScaler, sharded_scaler

NAMES = ["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]


@pytest.mark.parametrize("name", ["64-true", "fp8", ""])
def test_five_names_are_known(name):
    with pytest.raises(InvalidArgumentError, match=r"expected one of \['16-mixed', '16-true', '32-true',"):
        FSDPPrecision(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "16-mixed"])
def test_only_float16_under_autocast_takes_a_scaler(name):
    with pytest.raises(InvalidArgumentError, match="takes no scaler: only '16-mixed' scales gradients"):
        FSDPPrecision(name, scaler=torch.amp.GradScaler("cpu"))


def test_a_scaler_given_keeps_its_settings_and_becomes_one_that_ranks_agree_with():
    precision = FSDPPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=3.0))
    assert type(precision.scaler) is ShardedGradScaler
    assert precision.scaler.get_scale() == 4.0
    assert precision.scaler.get_growth_factor() == 3.0

    class Own(torch.amp.GradScaler):
        pass

    own = Own("cpu")
    assert sharded_scaler(own) is own


@pytest.mark.parametrize("name", NAMES)
def test_the_dtypes_that_fully_shard_is_told(name):
    policy = FSDPPrecision(name).mixed_precision_config
    half = torch.float16 if name.startswith("16") else torch.bfloat16
    expected = {"32-true": (None, None), "mixed": (half, torch.float32), "true": (half, half)}
    assert (policy.param_dtype, policy.reduce_dtype) == expected.get(name) or expected[name.split("-")[1]]


@pytest.mark.parametrize("name", NAMES)
def test_precisions_are_found_by_name(name):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision=name)
    assert type(fabric.strategy.precision) is FSDPPrecision
    assert fabric.strategy.precision.precision == name
    assert fabric.strategy.precision.changes_forward is (name != "32-true")


class Dtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.ones(4))

    def forward(self, x):
        self.seen = x.dtype, self.inner.weight.dtype, torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
        return self.inner(x)


def dtypes(name):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision=name)
    fabric.launch()
    module = Dtypes()
    model = fabric.setup(module)
    output = model(torch.ones(2, 4, dtype=torch.float64))
    fabric.backward(output.sum())
    stored = module.inner.weight.dtype, module.inner.weight.grad.dtype
    return [str(d) for d in (*module.seen, output.dtype, *stored)], model._run is module


@needs_fsdp
def test_what_runs_in_which_dtype(workers):
    half, single = "torch.bfloat16", "torch.float32"
    expected = {
        "32-true": (["torch.float64", single, "False", single], None),
        "bf16-mixed": ([half, half, "True", single, single, single, single], False),
        "bf16-true": ([half, half, "False", half, single, half, half], False),
    }
    for name in ("bf16-mixed", "bf16-true"):
        assert workers(2).run(dtypes, name) == [expected[name]] * 2


def called():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    module = Model()
    return fabric.setup(module)._run is module


@needs_fsdp
def test_in_single_precision_the_module_itself_is_called(workers):
    assert workers(2).run(called) == [True, True]


def overflow(name, devices):
    """What a step does when the gradients of the last rank overflow, and what the next one does."""
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=make_strategy(name, devices)[0], precision="16-mixed")
    fabric.launch()
    module = Model()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    scaler = fabric.strategy.precision.scaler
    changed, scales, finite = [], [], []
    for step in range(3):
        before = [whole(p).clone() for p in model.parameters()]
        fabric.backward(model.training_step(batches(1, 4)[0]))
        if step == 1 and fabric.global_rank == devices - 1:
            local(next(p.grad for p in model.parameters() if local(p.grad).numel())).view(-1)[0] = math.inf
        if step:
            finite.append(clipped(fabric, model, optimizer))
        optimizer.step()
        optimizer.zero_grad()
        changed.append(not all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True)))
        scales.append(scaler.get_scale())
    return changed, scales, finite


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def clipped(fabric, model, optimizer):
    return fabric.clip_gradients(model, optimizer, max_norm=0.1, error_if_nonfinite=False).isfinite().item()


@needs_fsdp
@pytest.mark.parametrize(
    ("name", "devices"), [("FULL_SHARD", 2), ("NO_SHARD", 2), ("tp", 2), ("hsdp", 4), ("fsdp x tp", 4)]
)
def test_where_one_rank_overflows_no_rank_steps(name, devices, workers):
    for changed, scales, finite in workers(devices).run(overflow, name, devices):
        assert changed == [True, False, True]
        assert scales == [65536.0, 32768.0, 32768.0]
        if name == "FULL_SHARD":  # elsewhere others hold a copy of what was made infinite here
            assert finite == [False, True]


def scaled_norm(precision):
    """Gradients are brought to their true scale before they are clipped, once."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision=precision)
    fabric.launch()
    torch.manual_seed(1)
    module = Model()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(model.training_step(batches(1, 4)[0]))
    first = fabric.clip_gradients(model, optimizer, max_norm=1e-3).item()
    fabric.clip_gradients(model, optimizer, clip_val=1.0)
    second = fabric.clip_gradients(model, optimizer, max_norm=1.0).item()
    optimizer.step()
    return first, second


@needs_fsdp
def test_gradients_are_unscaled_before_they_are_clipped(workers):
    (single, _), _ = workers(2).run(scaled_norm, "32-true")
    for first, second in workers(2).run(scaled_norm, "16-mixed"):
        assert first == pytest.approx(single, rel=5e-3)
        assert second == pytest.approx(1e-3, rel=1e-2)


def half_parameters():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision="16-mixed")
    fabric.launch()
    module = Model().half()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(model.training_step(batches(1, 4)[0]))
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return None


@needs_fsdp
def test_parameters_in_float16_cannot_be_unscaled(workers):
    for message in workers(2).run(half_parameters):
        assert "Gradients in float16 cannot be unscaled: the parameters must be in float32" in message


def fused():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision="16-mixed")
    fabric.launch()
    torch.manual_seed(1)
    module = Model()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True))
    before = whole(module.head.weight).clone()
    fabric.backward(model.training_step(batches(1, 4)[0]))
    optimizer.step()
    return (whole(module.head.weight) - before).abs().max().item()


@needs_fsdp
def test_fused_optimizers_step(workers):
    for change in workers(2).run(fused):
        assert change == pytest.approx(0.1, rel=0.1)


def resumed():
    """The scale is part of the precision's state."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision="16-mixed")
    fabric.launch()
    precision = fabric.strategy.precision
    state = precision.state_dict()
    state["scale"] = 2.0
    precision.load_state_dict(state)
    return precision.pre_backward(torch.tensor(3.0), None).item(), str(precision.device)


@needs_fsdp
def test_the_scale_is_restored(workers):
    assert workers(2).run(resumed) == [(6.0, "cpu")] * 2
