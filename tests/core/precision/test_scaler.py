"""Float16 with a gradient scaler. It runs on the CPU too, given as a plugin object."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from fabric_core import Fabric
from fabric_core.precision import MixedPrecision


def prepared(optimizer=torch.optim.SGD, scale=4.0, **options):
    """Fabric, model and optimizer with a scaler of the given scale; the model's loss has gradient 1 in each weight."""
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=1)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", device="cpu", scaler=scaler))
    module = nn.Linear(2, 1, bias=False)
    model, optimizer = fabric.setup(module, optimizer(module.parameters(), lr=1.0, **options))
    return fabric, model, optimizer, fabric.strategy.precision


def loss(model, value=1.0):
    return model(torch.full((1, 2), value)).sum()


def test_compute_is_in_float16_and_parameters_are_not():
    _, model, _, precision = prepared()
    seen = []
    model.module.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    assert model(torch.ones(1, 2)).dtype == torch.float32
    assert seen == [torch.float16]
    assert (model.weight.dtype, precision.compute_dtype) == (torch.float32, torch.float16)


def test_a_scaler_is_made_where_none_is_given():
    assert isinstance(MixedPrecision("16-mixed", device="cpu").scaler, GradScaler)
    assert MixedPrecision("bf16-mixed").scaler is None


def test_gradients_are_scaled_until_the_step():
    fabric, model, optimizer, _ = prepared()
    before = model.weight.detach().clone()
    fabric.backward(loss(model))
    assert model.weight.grad.tolist() == [[4.0, 4.0]]
    optimizer.step()
    assert torch.allclose(before - model.weight, torch.ones(1, 2))


def test_gradients_are_unscaled_before_clipping_and_only_once():
    fabric, model, optimizer, _ = prepared()
    before = model.weight.detach().clone()
    fabric.backward(loss(model))
    norm = fabric.clip_gradients(model, optimizer, max_norm=100.0)
    again = fabric.clip_gradients(model, optimizer, max_norm=100.0)
    assert norm.item() == again.item() == pytest.approx(2**0.5)
    optimizer.step()
    assert torch.allclose(before - model.weight, torch.ones(1, 2))


def test_clipping_by_value_unscales_too():
    fabric, model, optimizer, _ = prepared()
    fabric.backward(loss(model))
    fabric.clip_gradients(model, optimizer, clip_val=0.5)
    assert model.weight.grad.tolist() == [[0.5, 0.5]]


def test_a_step_with_infinite_gradients_is_skipped_and_the_scale_shrinks():
    fabric, model, optimizer, precision = prepared()
    before = model.weight.detach().clone()
    fabric.backward(loss(model))
    model.weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert torch.equal(before, model.weight)
    assert precision.scaler.get_scale() == 2.0


def test_a_step_with_finite_gradients_lets_the_scale_grow():
    fabric, model, optimizer, precision = prepared()
    fabric.backward(loss(model))
    optimizer.step()
    assert precision.scaler.get_scale() == 8.0


def test_training_goes_on_after_a_skipped_step():
    fabric, model, optimizer, _ = prepared()
    for value in (float("inf"), 1.0):
        optimizer.zero_grad()
        fabric.backward(loss(model, value))
        before = model.weight.detach().clone()
        optimizer.step()
    assert torch.allclose(before - model.weight, torch.ones(1, 2))


def test_callbacks_hear_of_scaled_steps():
    heard = []

    class Listener:
        def on_after_optimizer_step(self, strategy, optimizer):
            heard.append(type(optimizer))

    fabric, model, optimizer, _ = prepared()
    fabric.callbacks.append(Listener())
    fabric.backward(loss(model))
    optimizer.step()
    assert heard == [torch.optim.SGD]


def test_the_scalers_state_is_the_precisions():
    fabric, model, optimizer, precision = prepared()
    fabric.backward(loss(model))
    optimizer.step()
    other = MixedPrecision("16-mixed", device="cpu")
    other.load_state_dict(precision.state_dict())
    assert other.scaler.get_scale() == 8.0


def test_lbfgs_is_refused():
    _, model, optimizer, _ = prepared(torch.optim.LBFGS)
    with pytest.raises(TypeError, match="LBFGS cannot run under '16-mixed'"):
        optimizer.step(lambda: loss(model))


def test_lbfgs_runs_under_bfloat16():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    module = nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.LBFGS(module.parameters(), max_iter=2))

    def closure():
        optimizer.zero_grad()
        value = loss(model).pow(2)
        fabric.backward(value)
        return value

    assert optimizer.step(closure).isfinite()


def test_an_optimizer_that_unscales_itself_cannot_be_clipped():
    fabric, model, optimizer, _ = prepared(torch.optim.Adam, fused=True)
    fabric.backward(loss(model))
    with pytest.raises(NotImplementedError, match="fused=False"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)


def test_an_optimizer_that_unscales_itself_steps_right():
    fabric, model, optimizer, _ = prepared(torch.optim.Adam, fused=True)
    before = model.weight.detach().clone()
    fabric.backward(loss(model))
    optimizer.step()
    assert torch.allclose(before - model.weight, torch.ones(1, 2), atol=1e-4)


def test_gradients_accumulate_in_the_scaled_domain():
    fabric, model, optimizer, _ = prepared()
    before = model.weight.detach().clone()
    for _ in range(3):
        fabric.backward(loss(model))
    optimizer.step()
    assert torch.allclose(before - model.weight, torch.full((1, 2), 3.0))


def test_gradients_are_unscaled_anew_after_each_step():
    fabric, model, optimizer, precision = prepared()
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(loss(model))
        assert model.weight.grad.tolist() == [[precision.scaler.get_scale()] * 2]
        assert fabric.clip_gradients(model, optimizer, max_norm=100.0).item() == pytest.approx(2**0.5)
        optimizer.step()
