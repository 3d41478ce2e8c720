"""Gradient accumulation, marked methods and compiled modules where parameters are split over processes."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from distributed.small_model import Model, batches, make_strategy, needs_fsdp, whole
from fabric_core import Fabric
from fabric_core.strategies.sharded.groups import fsdp_modules, parameter_groups

pytestmark = needs_fsdp


def launched(name="FULL_SHARD", devices=2, **options):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=make_strategy(name, devices, **options)[0])
    fabric.launch()
    return fabric


def switches(model):
    groups = [group for unit in fsdp_modules(model.module) for group in parameter_groups(unit)]
    return {(group.reduce_grads, group.all_reduce_grads) for group in groups}


def switched():
    fabric = launched()
    model = fabric.setup(Model())
    seen = [switches(model)]
    with fabric.no_backward_sync(model):
        seen.append(switches(model))
        with fabric.no_backward_sync(model, enabled=False):
            seen.append(switches(model))
        seen.append(switches(model))
        try:
            with fabric.no_backward_sync(model, enabled=False):
                raise KeyError
        except KeyError:
            seen.append(switches(model))
    seen.append(switches(model))
    model.module.set_requires_all_reduce(False)  # the user's own choice
    with fabric.no_backward_sync(model, enabled=False):
        seen.append(switches(model))
    seen.append(switches(model))
    return seen


def test_the_exchange_of_gradients_is_as_it_was_afterwards(workers):
    on, off, half = {(True, True)}, {(False, False)}, {(True, False)}
    assert workers(2).run(switched) == [[on, off, on, off, off, on, on, half]] * 2


def refused():
    fabric = launched()
    fabric.setup(Model())
    messages = []
    for control in (fabric.no_backward_sync, lambda m: fabric.strategy.gradient_sync.no_backward_sync(m, True)):
        try:
            control(nn.Linear(1, 1))
        except TypeError as error:
            messages.append(str(error))
    return messages


def test_a_module_that_was_not_set_up_exchanges_nothing(workers):
    for facade, strategy in workers(2).run(refused):
        assert "takes the module that fabric.setup() returned" in facade
        assert "Linear that this strategy has not set up" in strategy


def accumulated(name, devices):
    """Gradients between the micro-batches, and whether the sum is that of the big batch."""
    fabric = launched(name, devices)
    torch.manual_seed(1)
    model = fabric.setup(Model())
    share = fabric.strategy.distributed_sampler_kwargs
    tokens = batches(1, 8)[0][share["rank"] :: share["num_replicas"]]
    fabric.backward(model.training_step(tokens))
    expected = [whole(p.grad).clone() for p in model.parameters()]
    model.zero_grad()
    between = []
    for index, part in enumerate(tokens.chunk(2)):
        with fabric.no_backward_sync(model, enabled=index == 0):
            fabric.backward(model.training_step(part) / 2)
        between.append(all(p.grad is not None for p in model.parameters()))
    return between, max(
        (a - whole(p.grad)).abs().max().item() for a, p in zip(expected, model.parameters(), strict=True)
    )


@pytest.mark.parametrize(("name", "devices"), [("FULL_SHARD", 2), ("fsdp x tp", 4), ("hsdp", 4)])
def test_gradients_arrive_with_the_last_micro_batch(name, devices, workers):
    for between, difference in workers(devices).run(accumulated, name, devices):
        assert between == [False, True]  # what is not exchanged waits elsewhere
        assert difference < 1e-6


def generated(name, options):
    """Tokens from a marked method that calls forward, and uses parameters of the root."""
    fabric = launched(name, **options)
    torch.manual_seed(1)
    model = fabric.setup(Model())
    with torch.no_grad():
        model.module.bias.fill_(0.5)
    model.mark_forward_method("generate")
    with torch.no_grad():
        without = model.generate(batches(1, 2)[0], 3)
    tokens = model.generate(batches(1, 2)[0], 3)
    fabric.backward(model.training_step(tokens))  # and it still trains
    return tokens.tolist(), torch.equal(tokens, without), [type(p.grad).__name__ for p in model.parameters()][:1]


@pytest.mark.parametrize(
    ("name", "options"),
    [("FULL_SHARD", {}), ("FULL_SHARD", {"reshard_after_forward": True}), ("fsdp by hand", {}), ("tp", {})],
)
def test_a_marked_method_may_call_forward_and_use_parameters(name, options, workers):
    torch.manual_seed(1)
    reference = Model()
    with torch.no_grad():
        reference.bias.fill_(0.5)
        expected = reference.generate(batches(1, 2)[0], 3).tolist()
    for tokens, same, kinds in workers(2).run(generated, name, options):
        assert tokens == expected
        assert same
        assert kinds == (["Tensor"] if name == "tp" else ["DTensor"])


def unmarked():
    fabric = launched()
    torch.manual_seed(1)
    model = fabric.setup(Model())
    tokens = model.continued(batches(1, 2)[0], 3).tolist()
    model.zero_grad()
    for unit in fsdp_modules(model.module):
        unit.reshard()
    try:
        model.total_bias(torch.ones(3))
    except RuntimeError as error:
        return tokens, str(error)
    return tokens, None


def test_an_unmarked_method_may_call_forward_but_use_no_parameter(workers):
    torch.manual_seed(1)
    expected = Model().continued(batches(1, 2)[0], 3).tolist()
    for tokens, message in workers(2).run(unmarked):
        assert tokens == expected
        assert "Model.total_bias() uses parameters of the module directly" in message
        assert 'model.mark_forward_method("total_bias")' in message


def compiled(name, reapply):
    """Which parts are compiled, what is called, and whether the result is that of the module alone."""
    fabric = launched(name)
    torch.manual_seed(1)
    module = Model()
    expected = module(batches(1, 2)[0])
    seen = torch.compile(module, backend="eager")
    model = fabric.setup(seen, _reapply_compile=reapply)
    output = model(batches(1, 2)[0])
    fabric.backward(output.sum())
    parts = [path for path, part in module.named_modules() if "forward" in vars(part)]
    return parts, model._forward_module is seen, isinstance(module, FSDPModule), (output - expected).abs().max().item()


@pytest.mark.parametrize(
    ("name", "parts"),
    [("FULL_SHARD", ["blocks.0", "blocks.1"]), ("fsdp by hand", ["blocks.0", "blocks.1"]), ("tp", [""])],
)
def test_units_are_compiled_one_by_one(name, parts, workers):
    for found, through, sharded, difference in workers(2).run(compiled, name, True, timeout=120):
        assert (found, through, sharded) == (parts, False, name != "tp")
        assert difference < 1e-5


@pytest.mark.parametrize("name", ["FULL_SHARD", "tp"])
def test_without_compiling_anew_the_compiled_module_is_called(name, workers):
    for found, through, sharded, difference in workers(2).run(compiled, name, False, timeout=120):
        assert (found, through, sharded) == ([], True, name != "tp")
        assert difference < 1e-5
