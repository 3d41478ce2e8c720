"""What cannot work says so before it hurts, and says what to type."""

import pytest
import torch
from deepspeed_network import STAGES, batches, launched, message, network


def adam(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def all_messages(stage):
    """Each refusal, and whether training goes on afterwards with the same objects."""
    fabric = launched(stage)
    texts = {}
    module = network()
    texts["two optimizers"] = message(fabric.setup, module, adam(module[0]), adam(module[5]))
    texts["optimizers alone"] = message(fabric.setup_optimizers, adam(network()))
    model, optimizer = fabric.setup(module, adam(module))
    x, y = batches(1, fabric.global_rank, 2)[0]
    texts["a step before any backward"] = message(optimizer.step)
    texts["clipping before any backward"] = message(fabric.clip_gradients, model, optimizer, max_norm=1.0)
    output = model(x)
    texts["a loss with a shape"] = message(fabric.backward, (output - y).square())
    loss = (output - y).square().mean()
    texts["a gradient handed in"] = message(fabric.backward, loss, torch.ones(()))
    texts["plain backward"] = message(loss.backward)
    loss = (model(x) - y).square().mean()
    fabric.backward(loss)
    texts["by value"] = message(fabric.clip_gradients, model, optimizer, clip_val=0.1)
    texts["another norm"] = message(fabric.clip_gradients, model, optimizer, max_norm=1.0, norm_type=1.0)
    optimizer.step()
    optimizer.zero_grad()
    after = (model(x) - y).square().mean()
    fabric.teardown()
    return texts, after.item() < loss.item()


@pytest.mark.parametrize("stage", STAGES)
def test_refusals(stage, workers):
    for texts, went_on in workers(2).run(all_messages, stage):
        assert texts["two optimizers"].startswith("InvalidArgumentError: ")
        assert "takes one" in texts["two optimizers"]
        assert texts["optimizers alone"].startswith("UsageError: ")
        assert "fabric.setup(model, optimizer)" in texts["optimizers alone"]
        assert texts["a step before any backward"].startswith("UsageError: ")
        assert "backward" in texts["a step before any backward"]
        assert texts["clipping before any backward"].startswith("UsageError: ")
        assert texts["a loss with a shape"].startswith("InvalidArgumentError: ")
        assert "()" in texts["a loss with a shape"]
        assert texts["a gradient handed in"].split(":")[0] in ("InvalidArgumentError", "UnsupportedError")
        assert texts["plain backward"].startswith("UsageError: ")
        assert "fabric.backward(loss)" in texts["plain backward"]
        assert texts["by value"].startswith("UnsupportedError: ")
        assert "max_norm" in texts["by value"]
        assert texts["another norm"].startswith("UnsupportedError: ")
        assert went_on


def nonfinite(stage, strict):
    """A loss that is infinite on one rank, clipped; what is raised, and the parameters before and after."""
    fabric = launched(stage)
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    x, y = batches(1, fabric.global_rank, 2)[0]
    scale = float("inf") if fabric.global_rank else 1.0
    fabric.backward((model(x) - y).square().mean() * scale)
    text = message(fabric.clip_gradients, model, optimizer, max_norm=1.0, error_if_nonfinite=strict)
    fabric.teardown()
    return text


@pytest.mark.parametrize("stage", STAGES)
def test_a_norm_that_is_not_finite(stage, workers):
    for text in workers(2).run(nonfinite, stage, True):
        assert text.startswith("UsageError: ")
        assert "error_if_nonfinite=False" in text
    assert workers(2).run(nonfinite, stage, False) == ["nothing was raised"] * 2
