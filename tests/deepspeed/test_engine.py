"""Engines: who finds which, what they do to a module, and what is left of them at the end."""

import pytest
import torch
from deepspeed_network import INPUTS, batches, launched, message, network
from torch import nn


def holders(stage):
    """Whether each object of a model leads to its own engine, before and after teardown."""
    from fabric_deepspeed.engine import engine_of

    fabric = launched(stage)
    owned = []
    for _ in range(2):
        module = network()
        _, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters()))
        engine = fabric.strategy.model
        owned.append((engine, [engine, module, optimizer.optimizer, engine.optimizer]))
    found = [all(engine_of(one) is engine for one in objects) for engine, objects in owned]
    listed = [one for one, _ in owned] == fabric.strategy.engines
    foreign = [engine_of(one) for one in (module[0], network(), 3, [], None)]
    fabric.teardown()
    return found, listed, foreign, [engine_of(one) for _, objects in owned for one in objects], fabric.strategy.engines


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engine_is_found_by_what_belongs_to_it(stage, workers):
    for found, listed, foreign, afterwards, engines in workers(2).run(holders, stage):
        assert found == [True, True]
        assert listed
        assert foreign == [None] * 5
        assert afterwards == [None] * 8
        assert engines == []


def hooks(module):
    return [
        len(table)
        for part in module.modules()
        for table in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    ]


def bare_again(stage):
    """A module after its engine: without hooks, and with parameters that accept another backward."""
    fabric = launched(stage)
    module = network()
    fabric.setup(module, torch.optim.Adam(module.parameters()))
    fabric.teardown()
    module(torch.ones(2, INPUTS)).sum().backward()
    return hooks(module) == hooks(network()), module[0].weight.grad is not None


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_module_has_no_hooks_left_after_its_engine(stage, workers):
    assert workers(2).run(bare_again, stage) == [(True, True)] * 2


def alone(stage, precision):
    """A module without optimizer: how far its outputs are from the plain module's, and what training it says."""
    fabric = launched(stage, precision=precision)
    x, module = torch.ones(2, INPUTS), network()
    expected = network()(x)
    model = fabric.setup(module)
    with torch.inference_mode():
        output = model.eval()(x)
    split = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    refusal = message(fabric.backward, model(x).sum())
    fabric.teardown()
    return (output - expected).abs().max().item(), str(output.dtype), split, refusal


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_module_alone_is_for_inference(stage, precision, workers):
    for difference, dtype, split, refusal in workers(2).run(alone, stage, precision):
        assert difference <= (0.0 if precision == "32-true" else 1e-2)
        assert dtype == "torch.float32"
        assert split == (stage == 3)
        assert refusal.startswith("UsageError: ")
        assert "fabric.setup(model, optimizer)" in refusal


def compiled(stage, compile):
    """Losses of a model, compiled or not, and how many graphs the compiler made."""
    fabric = launched(stage)
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    model, optimizer = fabric.setup(torch.compile(module, backend="eager") if compile else module, optimizer)
    losses = []
    for x, y in batches(3, fabric.global_rank, 2):
        loss = (model(x) - y).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    fabric.teardown()
    torch._dynamo.reset()
    counters.clear()
    return losses, graphs


@pytest.mark.parametrize("stage", [2, 3])
def test_a_compiled_module_stays_compiled(stage, workers):
    (losses, graphs), _ = workers(2).run(compiled, stage, True, timeout=120)
    assert losses == pytest.approx(workers(2).run(compiled, stage, False)[0][0], abs=1e-6)
    assert graphs > 0


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, INPUTS).T)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        return x @ self.weight + self.shift


def odd(stage):
    fabric = launched(stage)
    module = Odd()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    output = model(torch.ones(2, INPUTS))
    fabric.backward(output.sum())
    optimizer.step()
    fabric.teardown()
    return (output - Odd()(torch.ones(2, INPUTS))).abs().max().item()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_in_another_order_of_memory(stage, workers):
    assert max(workers(2).run(odd, stage)) <= 1e-6


def evaluated_in_inference_mode():
    """At stage 3, where forward makes the parameters whole: they must still be trainable."""
    fabric = launched(3)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.01))
    losses = []
    for x, y in batches(3, fabric.global_rank, 2):
        with torch.inference_mode():
            assert not model(x).requires_grad
        loss = (model(x) - y).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    fabric.teardown()
    return losses


def test_inference_mode_does_not_spoil_training(workers):
    losses = workers(2).run(evaluated_in_inference_mode)[0]
    assert losses == pytest.approx(workers(2).run(compiled, 3, False)[0][0], abs=1e-6)
