"""Methods that stand in for ``forward``, and the guard for those that nobody marked."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fabric_core import Fabric
from fabric_core.testing import FakeStrategy
from fabric_core.testing.fake import FakeWrapper


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, x, scale=1):
        return self(x).sum() * scale

    def generate(self, x):
        """Generate something."""
        return [self(x) for _ in range(2)]

    def hidden(self, x):
        return self.layer(x)

    def nested(self, x):
        return self.generate(x)[0]

    def failing(self, x):
        raise KeyError("in the method")

    def describe(self):
        return "no part is called"

    def run(self, function):
        return function()


class CountingWrapper(FakeWrapper):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


class Wrapping(FakeStrategy):
    def setup_module(self, module):
        return CountingWrapper(module)


def setup(**arguments):
    fabric = Fabric(accelerator="fake", strategy=Wrapping(), devices=2, **arguments)
    fabric.launch()
    return fabric.setup(Model())


@pytest.fixture
def model(fake_backend):
    return setup()


X = torch.ones(1, 2)


@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_the_step_methods_go_through_the_wrapper_unasked(fake_backend, name):
    class Stepping(Model):
        pass

    setattr(Stepping, name, lambda self, x: self(x).sum())
    fabric = Fabric(accelerator="fake", strategy=Wrapping(), devices=2)
    fabric.launch()
    model = fabric.setup(Stepping())
    assert getattr(model, name)(X) == model.module(X).sum()
    assert model._forward_module.calls == 1


def test_arguments_and_results_pass_through(model):
    assert model.training_step(X, scale=3) == model.module.training_step(X) * 3


def test_a_marked_method_goes_through_the_wrapper_once(model):
    model.mark_forward_method("generate")
    assert len(model.generate(X)) == 2
    assert model._forward_module.calls == 1


def test_a_method_can_be_marked_itself(model):
    model.mark_forward_method(model.module.generate)
    model.mark_forward_method(model.hidden)
    assert torch.equal(model.generate(X)[0], model.hidden(X))
    assert model._forward_module.calls == 2


def test_a_marked_method_keeps_its_name_and_documentation(model):
    model.mark_forward_method("generate")
    assert model.generate.__name__ == "generate"
    assert model.generate.__doc__ == "Generate something."


def test_a_marked_method_may_call_the_forward_and_other_methods(model):
    model.mark_forward_method("nested")
    assert torch.equal(model.nested(X), model(X))


def test_a_marked_method_may_call_another_through_the_wrapper(fake_backend):
    class Outer(Model):
        def nested(self, x):
            return self.wrapper[0].generate(x)[0]

    fabric = Fabric(accelerator="fake", strategy=Wrapping(), devices=2)
    fabric.launch()
    model = fabric.setup(Outer())
    model.module.wrapper = [model]
    model.mark_forward_method("nested")
    model.mark_forward_method("generate")
    assert torch.equal(model.nested(X), model(X))
    assert "forward" not in vars(model.module)


def test_the_precision_applies_to_marked_methods(fake_backend):
    model = setup(precision="64-true")
    seen = []
    model.layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    assert model.training_step(X).dtype == torch.float32
    assert seen == [torch.float64]


def test_the_forward_is_back_after_the_call(model):
    model.training_step(X)
    assert "forward" not in vars(model.module)


def test_the_forward_is_back_after_an_error_in_the_method(model):
    model.mark_forward_method("failing")
    with pytest.raises(KeyError, match="in the method"):
        model.failing(X)
    assert "forward" not in vars(model.module)


def test_the_forward_is_back_after_an_error_before_the_method(model):
    def refuse(module, args):
        raise LookupError("before the inner forward")

    handle = model._forward_module.register_forward_pre_hook(refuse)
    with pytest.raises(LookupError):
        model.training_step(X)
    handle.remove()
    assert "forward" not in vars(model.module)
    assert model(X).shape == (1, 1)


def test_a_forward_of_the_instance_is_put_back(model):
    mine = lambda x: torch.zeros(1, 1)  # noqa: E731
    model.module.forward = mine
    assert model.training_step(X) == 0
    assert vars(model.module)["forward"] is mine


def test_a_mark_for_a_method_that_vanished_is_an_ordinary_miss(fake_backend):
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'training_step'"):
        Fabric(accelerator="cpu", devices=1).setup(nn.Linear(1, 1)).training_step  # noqa: B018


def test_an_unmarked_method_that_runs_parts_is_refused(model):
    for name in ("hidden", "generate"):
        with pytest.raises(RuntimeError, match=rf'Model\.{name}\(\) runs parts.*mark_forward_method\("{name}"\)'):
            getattr(model, name)(X)


def test_an_unmarked_method_that_runs_no_part_is_fine(model):
    assert model.describe() == "no part is called"


def test_an_unmarked_method_may_call_other_modules(model):
    assert model.run(lambda: nn.Linear(2, 3)(X)).shape == (1, 3)


def test_with_nothing_around_the_module_every_method_is_fine():
    model = Fabric(accelerator="cpu", devices=1).setup(Model())
    assert torch.equal(model.hidden(X), model(X))


def test_the_guard_leaves_no_hook_behind(model):
    for call in (lambda: model.hidden(X), lambda: model.failing(X), model.describe):
        with contextlib.suppress(RuntimeError, KeyError):
            call()
        assert not torch_module._global_forward_pre_hooks
        assert not any(part._forward_pre_hooks for part in model.modules())


def test_the_guard_looks_at_its_own_thread_only(model):
    def forward_in_another_thread():
        worker = threading.Thread(target=lambda: results.append(model.module(X)))
        worker.start()
        worker.join()

    results = []
    model.run(forward_in_another_thread)
    assert len(results) == 1
