"""Gradients gathered over several backward passes: the steps are those of one process that sums them itself."""

import pytest
import torch
from deepspeed_network import SPLIT, apart, batches, launched, message, network, whole

from fabric_deepspeed import DeepSpeedStrategy

STEPS, PARTS = 4, 3
OFFLOAD = {"zero_force_ds_cpu_optimizer": False}
WAYS = {
    "stage 0": {"config": {"zero_optimization": {"stage": 0}}},
    "stage 1": {"config": {"zero_optimization": {"stage": 1, "overlap_comm": True}}},
    "stage 1 without overlap": {"config": {"zero_optimization": {"stage": 1, "overlap_comm": False}}},
    "stage 1 offloaded": {"stage": 1, "offload_optimizer": True, "config": OFFLOAD},
    "stage 2": {"config": {"zero_optimization": {"stage": 2}}},
    "stage 2 in pieces": {"config": {"zero_optimization": {"stage": 2, "contiguous_gradients": False}}},
    "stage 2 offloaded": {"stage": 2, "offload_optimizer": True, "config": OFFLOAD},
    "stage 3": {"stage": 3, "config": SPLIT},
    "stage 3 offloaded": {"stage": 3, "offload_optimizer": True, "config": {**SPLIT, **OFFLOAD}},
}


def parts(rank=0, world_size=1):
    """For each step its micro-batches."""
    every = batches(STEPS * PARTS, rank, world_size)
    return [every[first : first + PARTS] for first in range(0, STEPS * PARTS, PARTS)]


def expected(clip=None):
    """Parameters and norms of one process on the whole batches, with gradients summed by torch."""
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    norms = []
    for step in parts():
        for x, y in step:
            ((module(x) - y).square().mean() / PARTS).backward()
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return whole(module), norms


def prepared(way):
    strategy = way if isinstance(way, DeepSpeedStrategy) else DeepSpeedStrategy(**WAYS[way])
    fabric = launched(strategy)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.01))
    return fabric, module, model, optimizer


def train(way, held, clip=None):
    """``held(index)``: whether this micro-batch is under ``no_backward_sync``."""
    fabric, module, model, optimizer = prepared(way)
    norms = []
    for step in parts(fabric.global_rank, 2):
        for index, (x, y) in enumerate(step):
            with fabric.no_backward_sync(model, enabled=held(index)):
                fabric.backward((model(x) - y).square().mean() / PARTS)
        if clip is not None:
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=clip).item())
        optimizer.step()
        optimizer.zero_grad()
    found = whole(module)
    fabric.teardown()
    return found, norms


def all_but_the_last(way, clip):
    return train(way, lambda index: index < PARTS - 1, clip)


def all_of_them(way, clip):
    """The last one too: its gradients are still exchanged, by what needs them first."""
    return train(way, lambda index: True, clip)


@pytest.mark.parametrize("clip", [None, 0.05], ids=["stepped", "clipped"])
@pytest.mark.parametrize("held", [all_but_the_last, all_of_them])
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_process(way, held, clip, workers):
    parameters, norms = expected(clip)
    for ours, our_norms in workers(2).run(held, way, clip):
        assert apart(ours, parameters) <= 3e-6
        assert our_norms == pytest.approx(norms, rel=1e-4)


def counted_by_deepspeed(config):
    """The boundary is DeepSpeed's: a step after each micro-batch, or one that is told to finish."""
    managed = config.get("managed_gradient_accumulation", True)
    fabric, module, model, optimizer = prepared(DeepSpeedStrategy(config=config))
    for step in parts(fabric.global_rank, 2):
        for index, (x, y) in enumerate(step):
            fabric.backward((model(x) - y).square().mean() / (1 if managed else PARTS))
            if managed or index == PARTS - 1:
                optimizer.step()
        optimizer.zero_grad()
    found = whole(module)
    fabric.teardown()
    return found


@pytest.mark.parametrize("how", [{"gradient_accumulation_steps": PARTS}, {"managed_gradient_accumulation": False}])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_own_counting_works(stage, how, workers):
    config = {"zero_optimization": {"stage": stage, "overlap_comm": False}, **how}
    parameters, _ = expected()
    for ours in workers(2).run(counted_by_deepspeed, config):
        assert apart(ours, parameters) <= 3e-6


def exchanged_each_time(way):
    return train(way, lambda index: False)[0]


@pytest.mark.parametrize("way", ["stage 0", "stage 3", "stage 3 offloaded"])
def test_stages_that_add_up_may_exchange_each_time(way, workers):
    for ours in workers(2).run(exchanged_each_time, way):
        assert apart(ours, expected()[0]) <= 3e-6


def again(way):
    fabric, _, model, optimizer = prepared(way)
    (x, y), *_ = parts(fabric.global_rank, 2)[0]
    fabric.backward((model(x) - y).square().mean())
    text = message(fabric.backward, (model(x) - y).square().mean())
    optimizer.step()
    fabric.teardown()
    return text


@pytest.mark.parametrize("way", ["stage 1", "stage 1 offloaded", "stage 2", "stage 2 in pieces", "stage 2 offloaded"])
def test_stages_that_would_drop_gradients_say_so(way, workers):
    for text in workers(2).run(again, way):
        assert text.startswith("UsageError: ")
        assert "fabric.no_backward_sync(model)" in text


def inside(way):
    """A step inside the block; and whether the engine's boundary is back after blocks in blocks and a failure."""
    fabric, _, model, optimizer = prepared(way)
    engine = fabric.strategy.model
    x, y = batches(1, fabric.global_rank, 2)[0]
    boundaries = [engine.is_gradient_accumulation_boundary()]

    def fail():
        with fabric.no_backward_sync(model):
            boundaries.append(engine.is_gradient_accumulation_boundary())
            with fabric.no_backward_sync(model, enabled=False):
                boundaries.append(engine.is_gradient_accumulation_boundary())
            boundaries.append(engine.is_gradient_accumulation_boundary())
            fabric.backward((model(x) - y).square().mean())
            optimizer.step()

    text = message(fail)
    boundaries.append(engine.is_gradient_accumulation_boundary())
    foreign = message(fabric.strategy.gradient_sync.no_backward_sync, network(), True)
    fabric.teardown()
    return text, boundaries, foreign


@pytest.mark.parametrize("way", ["stage 0", "stage 2", "stage 3"])
def test_a_step_inside_is_refused_and_the_boundary_is_restored(way, workers):
    for text, boundaries, foreign in workers(2).run(inside, way):
        assert text.startswith("UsageError: ")
        assert "no_backward_sync" in text
        assert boundaries == [True, False, True, False, True]
        assert foreign.startswith("InvalidTypeError: ")


def twice_through_one_graph(way):
    """Two losses of one forward, the graph kept between."""
    fabric, module, model, optimizer = prepared(way)
    for (x, y), *_ in parts(fabric.global_rank, 2):
        output = model(x)
        with fabric.no_backward_sync(model):
            fabric.backward((output - y).square().mean(), retain_graph=True)
        fabric.backward(output.abs().mean())
        optimizer.step()
    found = whole(module)
    fabric.teardown()
    return found


@pytest.mark.parametrize("way", [way for way in WAYS if "3" not in way])
def test_a_graph_may_be_gone_through_twice(way, workers):
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for (x, y), *_ in parts():
        output = module(x)
        optimizer.zero_grad()
        ((output - y).square().mean() + output.abs().mean()).backward()
        optimizer.step()
    for ours in workers(2).run(twice_through_one_graph, way):
        assert apart(ours, whole(module)) <= 3e-6


def refused(way):
    fabric, _, model, optimizer = prepared(way)
    x, _ = batches(1, fabric.global_rank, 2)[0]
    loss = model(x).sum()
    texts = [message(optimizer.step, lambda: loss), message(fabric.backward, loss, create_graph=True)]
    if fabric.strategy.zero_stage_3:
        texts.append(message(fabric.backward, loss, retain_graph=True))
    fabric.teardown()
    return texts


@pytest.mark.parametrize("way", ["stage 0", "stage 2", "stage 3"])
def test_what_an_engine_cannot_do_is_refused(way, workers):
    for texts in workers(2).run(refused, way):
        assert all(text.startswith("UnsupportedError: ") for text in texts)
        assert "closure" in texts[0]
        assert "create_graph" in texts[1]
        assert way != "stage 3" or "Add the losses up" in texts[2]
