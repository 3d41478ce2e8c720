"""Backward, clipping, accumulation, moving and the contexts that a loop opens."""

import contextlib
import math

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.warnings import FabricDeprecationWarning, PossibleUserWarning


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


def fake(**arguments):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2, **arguments)
    fabric.launch()
    return fabric


def prepared(fabric, gradient=(3.0, 4.0)):
    """A module whose weight has the given gradient, and its optimizer."""
    module = nn.Linear(2, 1, bias=False)
    module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=1.0))
    module.weight.grad = torch.tensor([gradient], dtype=module.weight.dtype)
    return module, optimizer


def test_backward_fills_gradients_as_the_loss_does():
    fabric = cpu()
    module = fabric.setup(nn.Linear(2, 1, bias=False))
    fabric.backward(module(torch.tensor([[2.0, 3.0]])).sum())
    assert module.weight.grad.tolist() == [[2.0, 3.0]]


def test_backward_passes_its_arguments_on():
    fabric = cpu()
    weight = torch.ones(2, requires_grad=True)
    fabric.backward(weight * 2, torch.tensor([1.0, 10.0]), retain_graph=True)
    assert weight.grad.tolist() == [2.0, 20.0]
    fabric.backward((weight * 2).sum(), gradient=torch.tensor(5.0))
    assert weight.grad.tolist() == [12.0, 30.0]


def test_backward_runs_the_precisions_hooks_with_the_arguments(fake_backend):
    fabric = fake(precision="fake")
    weight = torch.ones(2, requires_grad=True)
    fabric.backward(weight * 1.0, torch.tensor([1.0, 10.0]))
    assert weight.grad.tolist() == [2.0, 20.0]


def test_the_strategy_is_told_which_module_the_loss_belongs_to(fake_backend):
    from fabric_core.testing import FakeStrategy

    class Noting(FakeStrategy):
        def backward(self, tensor, module, *args, **kwargs):
            self.backward_module = module
            super().backward(tensor, module, *args, **kwargs)

    fabric = Fabric(accelerator="fake", strategy=Noting(), devices=2)
    fabric.launch()
    module = fabric.setup(nn.Linear(2, 1))
    fabric.backward(module(torch.ones(1, 2)).sum(), model=module)
    assert fabric.strategy.backward_module.module is module.module
    fabric.backward(module(torch.ones(1, 2)).sum())
    assert fabric.strategy.backward_module is None


def test_clipping_by_norm_scales_and_returns_the_norm_before():
    fabric = cpu()
    module, optimizer = prepared(fabric)
    norm = fabric.clip_gradients(module, optimizer, max_norm=1.0)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(5.0)
    assert module.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_small_gradients_stay_as_they_are():
    fabric = cpu()
    module, optimizer = prepared(fabric, (0.3, 0.4))
    assert fabric.clip_gradients(module, optimizer, max_norm=1.0).item() == pytest.approx(0.5)
    assert torch.equal(module.weight.grad, torch.tensor([[0.3, 0.4]]))


@pytest.mark.parametrize(("kind", "norm"), [(1, 7.0), (2.0, 5.0), ("inf", 4.0), (math.inf, 4.0)])
def test_clipping_knows_other_norms(kind, norm):
    fabric = cpu()
    assert fabric.clip_gradients(*prepared(fabric), max_norm=9.0, norm_type=kind).item() == pytest.approx(norm)


def test_clipping_by_value_limits_each_element_and_returns_nothing():
    fabric = cpu()
    module, optimizer = prepared(fabric, (3.0, -0.5))
    assert fabric.clip_gradients(module, optimizer, clip_val=1.0) is None
    assert module.weight.grad.tolist() == [[1.0, -0.5]]


def test_clipping_without_gradients_is_no_error():
    fabric = cpu()
    module, optimizer = prepared(fabric)
    optimizer.zero_grad()
    assert fabric.clip_gradients(module, optimizer, max_norm=1.0).item() == 0.0
    fabric.clip_gradients(module, optimizer, clip_val=1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients_untouched(bad):
    fabric = cpu()
    module, optimizer = prepared(fabric, (bad, 4.0))
    with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
    assert module.weight.grad[0, 1] == 4.0


def test_a_norm_that_is_not_finite_can_be_accepted():
    fabric = cpu()
    module, optimizer = prepared(fabric, (math.inf, 4.0))
    norm = fabric.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert norm.item() == math.inf


def test_only_the_gradients_of_the_optimizer_are_clipped():
    fabric = cpu()
    module, optimizer = prepared(fabric)
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.full((1,), 100.0)
    assert fabric.clip_gradients(module, optimizer, max_norm=1.0).item() == pytest.approx(5.0)
    assert other.grad.item() == 100.0


def test_clipping_takes_bare_objects_too():
    fabric = cpu()
    module, optimizer = prepared(fabric)
    assert fabric.clip_gradients(module.module, optimizer.optimizer, max_norm=1.0).item() == pytest.approx(5.0)


def test_gradients_are_unscaled_before_they_are_clipped(fake_backend):
    fabric = fake(precision="fake")
    module, optimizer = prepared(fabric)
    assert fabric.clip_gradients(module, optimizer, max_norm=100.0).item() == pytest.approx(2.5)
    module, optimizer = prepared(fabric)
    fabric.clip_gradients(module, optimizer, clip_val=1.6)
    assert torch.allclose(module.weight.grad, torch.tensor([[1.5, 1.6]], dtype=torch.float64))


def accumulated(fabric, rows):
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    module = fabric.setup(module)
    for index, row in enumerate(rows):
        with fabric.no_backward_sync(module, enabled=index < len(rows) - 1):
            fabric.backward(module(row).pow(2).sum() / len(rows))
    return module.weight.grad


def test_accumulated_gradients_equal_those_of_the_big_batch():
    rows = torch.randn(4, 1, 2, dtype=torch.float32)
    big = accumulated(cpu(), [rows.reshape(4, 2)]) / 4
    assert torch.allclose(accumulated(cpu(), list(rows)), big, atol=1e-6)


def test_a_strategy_that_cannot_skip_the_exchange_says_so(fake_backend):
    fabric = fake()
    module = fabric.setup(nn.Linear(2, 1))
    with pytest.warns(PossibleUserWarning, match="cannot skip the exchange"):
        context = fabric.no_backward_sync(module)
    with context:
        fabric.backward(module(torch.ones(1, 2)).sum())


def test_the_warning_about_the_exchange_has_a_switch(fake_backend, monkeypatch):
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")
    fabric = fake()
    with fabric.no_backward_sync(fabric.setup(nn.Linear(2, 1))):
        pass


def test_the_strategy_gets_its_own_module_and_the_switch(fake_backend):
    from fabric_core.testing import FakeStrategy

    class Sync:
        def __init__(self):
            self.seen = []

        def no_backward_sync(self, module, enabled):
            self.seen.append((type(module).__name__, enabled))
            return contextlib.nullcontext()

    class Skipping(FakeStrategy):
        gradient_sync = Sync()

    fabric = Fabric(accelerator="fake", strategy=Skipping(), devices=2)
    fabric.launch()
    module = fabric.setup(nn.Linear(2, 1))
    for enabled in (True, False):
        with fabric.no_backward_sync(module, enabled=enabled):
            pass
    assert Skipping.gradient_sync.seen == [("FakeWrapper", True), ("FakeWrapper", False)]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.float32)],
)
def test_autocast_is_the_precisions_forward_context(precision, dtype):
    a = torch.ones(2, 2, dtype=torch.float32)
    with cpu(precision=precision).autocast():
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_to_device_moves_a_module_in_place():
    module = nn.Linear(2, 1)
    assert cpu().to_device(module) is module


def test_to_device_moves_what_is_inside_collections():
    class Movable:
        def to(self, device):
            return ("moved", device)

    batch = {"a": [torch.ones(1), "text", 3], "b": Movable()}
    moved = cpu().to_device(batch)
    assert moved["b"] == ("moved", torch.device("cpu"))
    assert moved["a"][1:] == ["text", 3]
    assert isinstance(batch["b"], Movable)


def test_to_device_sets_the_device_up_first(fake_backend):
    fabric = fake()
    fabric.accelerator.current = None
    fabric.to_device(nn.Linear(2, 1))
    assert fabric.accelerator.current == fabric.device


DTYPES = {
    None: torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
}


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_init_contexts_make_the_precisions_dtype(precision, dtype):
    fabric = cpu(precision=precision)
    with fabric.init_tensor():
        assert torch.rand(2).dtype == dtype
        assert torch.arange(2).dtype == torch.int64
    with fabric.init_module():
        assert nn.Linear(2, 1).weight.dtype == dtype
    assert torch.rand(2).dtype == torch.float32


def test_init_contexts_make_things_on_the_device(fake_backend):
    fabric = fake()
    fabric.strategy.devices = [torch.device("meta")] * 2
    with fabric.init_tensor():
        assert torch.ones(1).device.type == "meta"
    with fabric.init_module():
        assert nn.Linear(2, 1).weight.device.type == "meta"
    assert torch.ones(1).device.type == "cpu"


def test_empty_init_skips_the_initialisation():
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2,), 7.0))
            calls.append(nn.init.ones_(self.weight).tolist())

    for empty in (False, True, None):
        with cpu().init_module(empty_init=empty):
            Counting()
    assert calls == [[1.0, 1.0], [7.0, 7.0], [1.0, 1.0]]


def test_an_error_inside_init_module_leaves_nothing_behind():
    with pytest.raises(KeyError), cpu(precision="64-true").init_module(empty_init=True):
        raise KeyError
    assert torch.ones(1).dtype == torch.float32
    assert nn.init.ones_(torch.zeros(1)).item() == 1.0


def test_sharded_model_is_there_and_deprecated():
    fabric = cpu()
    with pytest.warns(FabricDeprecationWarning, match="init_module"), fabric.sharded_model():
        module = nn.Linear(2, 2)
    assert not module.weight.is_meta
