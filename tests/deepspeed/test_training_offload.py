"""Optimizer states and parameters in host memory: the same results."""

import pytest
import torch
from deepspeed_network import Run, against_ddp, apart, batches, launched, network, whole

PRESETS = ["deepspeed_stage_1_offload", "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("run", [Run(), Run(accumulate=4), Run(clip=dict(max_norm=0.3))], ids=["plain", "4", "clip"])
def test_presets_with_an_optimizer_of_torch(preset, run, workers):
    for result in workers(2).run(against_ddp, preset, run):
        assert result["losses"] <= 3e-7
        assert result["norms"] <= 1e-6
        assert result["parameters"] <= 3e-7


def parts(stage):
    """Parameters offloaded: what this rank holds after set-up."""
    fabric = launched(stage, dict(offload_optimizer=True, offload_parameters=True))
    module = network()
    fabric.setup(module, torch.optim.AdamW(module.parameters()))
    held = [p.numel() < p.ds_numel for p in module.parameters() if p.ds_numel > 100]
    offloaded = fabric.strategy.config["zero_optimization"]["offload_param"]["device"]
    fabric.teardown()
    return held, offloaded


def test_stage_3_offloads_parameters(workers):
    for held, device in workers(2).run(parts, 3):
        assert held
        assert device == "cpu"


def with_the_cpu_optimizer(stage):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    results = []
    for strategy, options, kind in (
        ("ddp", None, torch.optim.AdamW),
        (stage, dict(offload_optimizer=True), DeepSpeedCPUAdam),
    ):
        fabric = launched(strategy, options)
        module = network()
        model, optimizer = fabric.setup(module, kind(module.parameters(), lr=0.01, weight_decay=0.01))
        for x, y in batches(20, fabric.global_rank, 2):
            fabric.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        results.append(whole(module))
        fabric.teardown()
    return apart(*results)


@pytest.mark.slow  # it compiles a native part
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("cpu_optimizer")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimizer_that_deepspeed_has_for_it(stage, workers):
    assert max(workers(2).run(with_the_cpu_optimizer, stage)) < 1e-5
