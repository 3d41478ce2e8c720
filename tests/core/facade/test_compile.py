"""``torch.compile`` before and after ``setup``. The backend ``eager`` compiles nothing, so that this stays quick."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.wrappers import is_wrapped
from fabric_core.wrappers.compile import is_compiled
from fabric_core.wrappers.unwrap import unwrap

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")


def compiled(module, **options):
    return torch.compile(module, backend="eager", **options)


class Stepping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, x):
        return self(x).sum()


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def two(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2)
    fabric.launch()
    return fabric


def test_a_compiled_module_is_unwrapped_and_what_the_strategy_made_is_compiled(two):
    module = nn.Linear(2, 1)
    wrapped = two.setup(compiled(module))
    assert wrapped.module is module
    assert is_compiled(wrapped._forward_module)
    assert type(wrapped._forward_module._orig_mod).__name__ == "FakeWrapper"


def test_the_same_backend_compiles_again(fabric):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wrapped = fabric.setup(torch.compile(nn.Linear(2, 1), backend=backend, dynamic=False))
    wrapped(torch.ones(3, 2))
    wrapped(torch.ones(3, 2))
    assert len(graphs) == 1


def test_the_strategy_can_wrap_the_compiled_module_as_it_is(fabric):
    for call in (fabric.setup, fabric.setup_module):
        module = compiled(nn.Linear(2, 1))
        wrapped = call(module, _reapply_compile=False)
        assert wrapped._forward_module is module
        assert set(wrapped.state_dict()) == {"weight", "bias"}


def test_a_compiled_module_computes_and_learns_the_same(fabric):
    module = nn.Linear(2, 1)
    expected = module(torch.ones(1, 2))
    wrapped, optimizer = fabric.setup(compiled(module), torch.optim.SGD(module.parameters(), lr=0.1))
    output = wrapped(torch.ones(1, 2))
    assert torch.allclose(output, expected)
    fabric.backward(output.sum())
    optimizer.step()
    assert not torch.allclose(wrapped(torch.ones(1, 2)), expected)


def test_state_dict_keys_know_nothing_of_the_compiler(two):
    wrapped = two.setup(compiled(nn.Linear(2, 1)))
    assert set(wrapped.state_dict()) == {"weight", "bias"}
    assert {name for name, _ in wrapped.named_parameters()} == {"weight", "bias"}


def test_a_module_compiled_after_setup_counts_as_set_up(fabric):
    outer = compiled(fabric.setup(nn.Linear(2, 1)))
    assert is_wrapped(outer)
    with pytest.raises(ValueError, match="already"):
        fabric.setup(outer)


def test_calls_see_through_what_was_compiled_after_setup(fabric, tmp_path):
    module = nn.Linear(2, 1)
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    outer = compiled(wrapped)
    with fabric.no_backward_sync(outer):
        fabric.backward(outer(torch.ones(1, 2)).sum())
    fabric.clip_gradients(outer, optimizer, max_norm=1.0)
    fabric.save(tmp_path / "a.ckpt", {"model": outer})
    assert set(fabric.load(tmp_path / "a.ckpt")["model"]) == {"weight", "bias"}
    assert unwrap(outer) is module


def test_a_bare_module_is_not_wrapped_even_when_compiled():
    assert not is_wrapped(compiled(nn.Linear(2, 1)))


def test_a_marked_method_runs_through_the_compiled_module(two):
    module = Stepping()
    expected = module(torch.ones(1, 2)).sum()
    wrapped = two.setup(compiled(module))
    assert torch.allclose(wrapped.training_step(torch.ones(1, 2)), expected)
    assert torch.allclose(wrapped(torch.ones(1, 2)).sum(), expected)


def test_a_marked_method_is_compiled_once_and_for_all(two):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wrapped = two.setup(torch.compile(Stepping(), backend=backend, dynamic=False))
    for _ in range(10):
        wrapped.training_step(torch.ones(1, 2))
        wrapped(torch.ones(1, 2))
    assert 1 <= len(graphs) <= 2


def test_a_precision_is_applied_around_the_compiled_module():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    wrapped = fabric.setup(compiled(nn.Linear(2, 1)))
    assert wrapped.weight.dtype == torch.bfloat16
    assert wrapped(torch.ones(1, 2)).dtype == torch.float32
