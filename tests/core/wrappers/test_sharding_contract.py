"""What a strategy that shards a module in place can ask of the wrappers: compile parts, enter methods, explain."""

from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.abc.precision import Precision
from fabric_core.errors import UsageError
from fabric_core.testing import FakeAccelerator, FakeStrategy
from fabric_core.wrappers.compile import is_compiled

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def generate(self, x):
        return self(self(x).expand(-1, 2))

    def mixed(self):
        raise RuntimeError("aten.add.Tensor: got mixed torch.Tensor and DTensor")

    def broken(self):
        raise RuntimeError("something else")

    def unsupported(self):
        raise UsageError("DTensor: an explanation already")


class InPlace(FakeStrategy):
    """Shards nothing, but behaves as one that shards the module itself."""

    shards_in_place: ClassVar[bool] = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = []

    def setup_module(self, module):
        return module

    def setup_compiled(self, module, optimizers, scheduler, compile):
        module.layer.forward = compile(module.layer.forward)
        return module, optimizers, scheduler

    @contextmanager
    def method_context(self, module):
        self.inside.append(module)
        yield
        self.inside.append(None)


@pytest.fixture
def fabric():
    fabric = Fabric(accelerator=FakeAccelerator(), strategy=InPlace(), devices=2)
    fabric.launch()
    return fabric


def test_a_strategy_may_compile_parts_and_the_whole_is_not_compiled_again(fabric):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = Model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model, wrapped = fabric.setup(torch.compile(module, backend=backend), optimizer)
    model(torch.ones(1, 2))
    assert model._forward_module is module
    assert not is_compiled(model._forward_module)
    assert wrapped.optimizer is optimizer
    assert len(graphs) == 1


def test_a_strategy_without_a_word_on_compiling_gets_the_whole_compiled():
    fabric = Fabric(accelerator=FakeAccelerator(), strategy=FakeStrategy(), devices=2)
    fabric.launch()
    module = Model()
    model, _ = fabric.setup(torch.compile(module, backend="eager"), torch.optim.SGD(module.parameters(), lr=0.1))
    assert is_compiled(model._forward_module)
    assert type(model._forward_module._orig_mod).__name__ == "FakeWrapper"


def test_the_strategy_is_entered_around_marked_methods_only(fabric):
    module = Model()
    model = fabric.setup(module)
    model(torch.ones(1, 2))
    model.generate(torch.ones(1, 2))
    assert fabric.strategy.inside == []
    model.mark_forward_method("generate")
    model.generate(torch.ones(1, 2))
    assert fabric.strategy.inside == [module, None]


def test_a_method_that_uses_parts_as_if_whole_is_told_to_be_marked(fabric):
    model = fabric.setup(Model())
    with pytest.raises(UsageError, match=r'Model\.mixed\(\) uses parameters.*mark_forward_method\("mixed"\)') as error:
        model.mixed()
    assert "got mixed" in str(error.value.__cause__)


def test_other_errors_of_methods_are_left_alone(fabric):
    model = fabric.setup(Model())
    with pytest.raises(RuntimeError, match=r"^something else$"):
        model.broken()
    with pytest.raises(UsageError, match="an explanation already"):
        model.unsupported()


def test_methods_of_other_strategies_are_the_users_own():
    model = Fabric(accelerator="cpu", devices=1).setup(Model())
    assert model.mixed.__func__ is Model.mixed


def test_a_precision_may_say_that_it_has_nothing_to_do_around_forward():
    class Sometimes(Precision):
        changes_forward = False

        def convert_input(self, data):
            raise AssertionError

    model = Fabric(accelerator="cpu", devices=1, plugins=Sometimes()).setup(Model())
    assert model(torch.ones(1, 2)).shape == (1, 1)
    assert model._run is model.module
