"""Twenty steps of AdamW under every ZeRO stage, held against ddp on the same data.

In float32 the results are those of ddp bit for bit, or to 3e-7 where sums are taken in another order, as when
gradients are accumulated or clipped. In 16 bits DeepSpeed keeps float32 copies for the optimizer: losses stay within
2e-2 of those of ddp in float32, and parameters on average within a fifth of one step.
"""

import pytest
import torch
from deepspeed_network import (
    STAGES,
    Run,
    against_ddp,
    apart,
    batches,
    half_on_cpu,
    launched,
    message,
    network,
    train,
    whole,
)

RUNS = {
    "plain": Run(),
    "gradients cleared before backward": Run(zero_first=True),
    "SGD with momentum": Run(optimizer="SGD", arguments=dict(momentum=0.9, weight_decay=0.1)),
    "accumulated": Run(accumulate=4),
    "clipped": Run(clip=dict(max_norm=0.3)),
    "clipped and accumulated": Run(accumulate=2, clip=dict(max_norm=0.3)),
    "barely clipped": Run(clip=dict(max_norm=100.0)),
}
EXACT = ["plain", "gradients cleared before backward", "SGD with momentum"]


def compare_all(stage, runs, references=None):
    references = references or [None] * len(runs)
    return [against_ddp(stage, run, reference) for run, reference in zip(runs, references, strict=True)]


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_float32_equals_ddp(stage, workers):
    for results in workers(2).run(compare_all, stage, [*RUNS.values()]):
        for name, result in zip(RUNS, results, strict=True):
            assert result["losses"] <= (0 if name in EXACT else 3e-7), name
            assert result["parameters"] <= (0 if name in EXACT else 3e-7), name
            assert result["norms"] <= 1e-6, name
            assert result["fell"], name


NAMES = ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]


@pytest.mark.parametrize("name", NAMES)
def test_names_equal_ddp(name, workers):
    for (result,) in workers(2).run(compare_all, name, [Run(accumulate=2, clip=dict(max_norm=0.3))]):
        assert result["losses"] <= 3e-7
        assert result["parameters"] <= 3e-7
        assert result["norms"] <= 1e-6


UNMARKED = Run(accumulate=4, marked=False)


@pytest.mark.parametrize("stage", [0, 3])
def test_backwards_add_up_without_being_told_so(stage, workers):
    for (result,) in workers(2).run(compare_all, stage, [UNMARKED]):
        assert result["parameters"] <= 3e-7


def refused(stage):
    return message(train, stage, UNMARKED)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_refuse_a_second_backward_that_they_would_lose(stage, workers):
    for text in workers(2).run(refused, stage):
        assert text.startswith("UsageError: fabric.backward() was called again before optimizer.step()")
        assert "fabric.no_backward_sync(model)" in text


def configured(stage):
    """DeepSpeed's own switches in the user's config, against the same asked of Fabric under ddp."""
    ours = train(stage, Run(strategy=dict(config={"gradient_clipping": 0.3})))[2]
    clipped = apart(ours, train("ddp", Run(clip=dict(max_norm=0.3)))[2])
    expected = train("ddp", Run(accumulate=4))[2]
    fabric = launched(stage, dict(config={"gradient_accumulation_steps": 4}))
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    for x, y in batches(20, fabric.global_rank, 2):
        for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
            fabric.backward((model(part) - target).square().mean())
            optimizer.step()  # every fourth of them is one
            optimizer.zero_grad()
    accumulated = apart(whole(module), expected)
    fabric.teardown()
    return clipped, accumulated


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_switches_of_the_config_do_what_calls_of_fabric_do(stage, workers):
    assert max(max(differences) for differences in workers(2).run(configured, stage)) <= 3e-7


HALVES = ["bf16-true", "bf16-mixed"]


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_close_to_ddp_in_float32(stage, workers):
    runs = [Run(precision=name, accumulate=n) for name in HALVES for n in (1, 4)]
    for results in workers(2).run(compare_all, stage, runs, [Run()] * 4):
        for result in results:
            assert 0 < result["losses"] < 2e-2
            assert result["mean"] < 2e-3
            assert result["fell"]


@pytest.mark.skipif(not half_on_cpu(), reason="this processor has no float16 arithmetic")
@pytest.mark.parametrize("stage", STAGES)
def test_float16_trains_close_to_ddp_in_float32(stage, workers):
    runs = [
        Run(precision=name, clip=clip, strategy=dict(initial_scale_power=8))
        for name in ("16-true", "16-mixed")
        for clip in (None, dict(max_norm=0.3))
    ]
    references = [Run(clip=run.clip) for run in runs]
    for results in workers(2).run(compare_all, stage, runs, references):
        for result in results:
            assert 0 < result["losses"] < 2e-2
            assert result["norms"] < 1e-2
            assert result["mean"] < 2e-3


def half():
    return [message(train, stage, Run(precision=name, steps=1)) for stage in STAGES for name in ("16-true", "16-mixed")]


@pytest.mark.skipif(half_on_cpu(), reason="this processor has float16 arithmetic")
def test_float16_is_refused_where_the_processor_has_none(workers):
    for messages in workers(2).run(half):
        for text in messages:
            assert "float16" in text or "fp16" in text
            assert "bf16" in text


def clip_once(stage):
    """A clipped step, and then one that is not: final parameters of ddp and of the stage."""
    made = []
    for strategy in ("ddp", stage):
        fabric = launched(strategy)
        module = network()
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for index, (x, y) in enumerate(batches(6, fabric.global_rank, 2)):
            fabric.backward((model(x) - y).square().mean())
            if index % 3 == 0:
                fabric.clip_gradients(model, optimizer, max_norm=0.01)
            optimizer.step()
            optimizer.zero_grad()
        made.append(whole(module))
        fabric.teardown()
    return apart(*made)


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_a_step_that_is_not_clipped_stays_so_after_one_that_is(stage, workers):
    assert max(workers(2).run(clip_once, stage)) <= 3e-7
