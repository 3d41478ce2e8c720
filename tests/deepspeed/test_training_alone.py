"""A module set up without an optimizer, ``init_module``, and Fabrics one after the other."""

import pytest
import torch
from deepspeed_network import INPUTS, STAGES, Run, apart, batches, launched, message, network, train, whole
from torch import nn


def inference(stage):
    """Outputs of a module set up alone, against its own before; and the size that this rank holds of it."""
    fabric = launched(stage)
    module, (x, _) = network(), batches(1)[0]
    with torch.no_grad():
        expected = module(x)
    model = fabric.setup_module(module)
    model.eval()
    with torch.no_grad():
        first = model(x)
    with torch.inference_mode():
        second = model(x)
    held = sum(p.numel() for p in module.parameters())
    fabric.teardown()
    return apart(dict(a=first, b=second), dict(a=expected, b=expected)), held


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_alone_computes_what_it_did(stage, workers):
    for difference, _ in workers(2).run(inference, stage):
        assert difference < 1e-6


def backward_without_optimizer():
    fabric = launched(2)
    model = fabric.setup_module(network())
    (x, y) = batches(1)[0]
    text = message(fabric.backward, (model(x) - y).square().mean())
    fabric.teardown()
    return text


def test_backward_needs_the_optimizer(workers):
    for text in workers(2).run(backward_without_optimizer):
        assert "optimizer" in text
        assert "fabric.setup(model, optimizer)" in text


def born_in_parts():
    """Parameters built under stage 3: what this rank holds of each while the module is still being built."""
    fabric = launched(3)
    with fabric.init_module():
        layer = nn.Linear(INPUTS, 6)
        held = layer.weight.numel()
        full = layer.weight.ds_numel
    outside = nn.Linear(INPUTS, 6)
    fabric.teardown()
    return held, full, outside.weight.numel()


def test_stage_3_splits_parameters_as_they_are_made(workers):
    for held, full, outside in workers(2).run(born_in_parts):
        assert held < full == outside == 6 * INPUTS


def precisions(stage):
    found = {}
    for precision in ("32-true", "bf16-true", "bf16-mixed"):
        fabric = launched(stage, precision=precision)
        with fabric.init_module():
            built = nn.Linear(INPUTS, 6)
        with fabric.init_tensor():
            tensor = torch.ones(1)
        model, _ = fabric.setup(built, torch.optim.SGD(built.parameters(), lr=0.1))
        out = model(torch.ones(2, INPUTS))
        found[precision] = str(built.weight.dtype), str(tensor.dtype), str(out.dtype)
        fabric.teardown()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_dtypes(stage, workers):
    for found in workers(2).run(precisions, stage):
        assert found["32-true"] == ("torch.float32",) * 3
        assert found["bf16-true"][:2] == ("torch.bfloat16",) * 2
        assert found["bf16-mixed"][0] == "torch.bfloat16"  # DeepSpeed keeps the float32 copies in the optimizer
        assert found["bf16-mixed"][1] == "torch.float32"


def one_after_another():
    """Other strategies before and after, in the same process."""
    runs = ["ddp", 2, "ddp", 3, 1, "ddp"]
    losses = [train(strategy, Run(steps=4))[0] for strategy in runs]
    return [apart(losses[0], other) for other in losses[1:]]


def test_strategies_follow_each_other_in_one_process(workers):
    assert max(max(result) for result in workers(2).run(one_after_another)) <= 3e-7


def both_at_once():
    """A Fabric with ddp and one with DeepSpeed, step by step."""
    parts, modules = [], (network(), network())
    for strategy, module in zip(("ddp", 2), modules, strict=True):
        fabric = launched(strategy)
        parts.append((fabric, *fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))))
    for x, y in batches(4, parts[0][0].global_rank, 2):
        for fabric, model, optimizer in parts:
            fabric.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    results = [whole(module) for module in modules]
    for fabric, *_ in reversed(parts):
        fabric.teardown()
    return apart(*results)


def test_two_fabrics_at_once(workers):
    assert max(workers(2).run(both_at_once)) <= 3e-7
