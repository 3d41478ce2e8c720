"""Several models with an optimizer each, in one program: what they learn is what they learn under ddp."""

import gc
import weakref

import pytest
import torch
from deepspeed_network import INPUTS, OUTPUTS, STAGES, apart, batches, launched, message, network, whole
from torch import nn


def small(seed, inputs, outputs):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs))


def two(fabric, first, second):
    return [
        fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.5, 0.9)))
        for module in (first, second)
    ]


def data(fabric, steps=8):
    return batches(steps, fabric.global_rank, fabric.world_size)


def side_by_side(fabric):
    modules = network(), small(3, INPUTS, OUTPUTS)
    (one, first), (two_, second) = two(fabric, *modules)
    for x, y in data(fabric):
        for model, optimizer, target in ((one, first, y), (two_, second, y.flip(0))):
            fabric.backward((model(x) - target).square().mean(), model=model)
            optimizer.step()
            optimizer.zero_grad()
    return modules


def adversaries(fabric):
    """Each clears its gradients before its own backward: the generator's reaches the other model's parameters too."""
    modules = small(1, OUTPUTS, INPUTS), small(2, INPUTS, 1)
    (generator, first), (critic, second) = two(fabric, *modules)
    for real, noise in data(fabric):
        fake = generator(noise)
        second.zero_grad()
        loss = critic(fake.detach()).square().mean() + (1 - critic(real)).square().mean()
        fabric.backward(loss, model=critic)
        second.step()
        first.zero_grad()
        fabric.backward((1 - critic(fake)).square().mean(), model=generator)
        first.step()
    return modules


def frozen_in_turns(fabric):
    """The critic is frozen while the generator goes backward through it, so nothing need be cleared before."""
    modules = small(1, OUTPUTS, INPUTS), small(2, INPUTS, 1)
    (generator, first), (critic, second) = two(fabric, *modules)
    for real, noise in data(fabric):
        critic.requires_grad_(False)
        fabric.backward((1 - critic(generator(noise))).square().mean(), model=generator)
        first.step()
        first.zero_grad()
        critic.requires_grad_(True)
        loss = critic(generator(noise).detach()).square().mean() + (1 - critic(real)).square().mean()
        fabric.backward(loss, model=critic)
        second.step()
        second.zero_grad()
    return modules


def one_loss(fabric):
    """An encoder and a decoder with an optimizer each, and one backward for both."""
    modules = small(1, INPUTS, 5), small(2, 5, OUTPUTS)
    (encoder, first), (decoder, second) = two(fabric, *modules)
    for x, y in data(fabric):
        fabric.backward((decoder(encoder(x)) - y).square().mean(), model=decoder)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    return modules


def clipped(fabric):
    modules = network(), small(3, INPUTS, OUTPUTS)
    pairs = two(fabric, *modules)
    for x, y in data(fabric):
        for model, _ in pairs:
            fabric.backward((model(x) - y).square().mean(), model=model)
        for index, (model, optimizer) in enumerate(pairs):
            if index == 0:
                fabric.clip_gradients(model, optimizer, max_norm=0.05)
            optimizer.step()
            optimizer.zero_grad()
    return modules


def accumulated_in_turns(fabric):
    modules = network(), small(3, INPUTS, OUTPUTS)
    (one, first), (two_, second) = two(fabric, *modules)
    for index, (x, y) in enumerate(data(fabric)):
        with fabric.no_backward_sync(one, enabled=index % 2 == 0):
            fabric.backward((one(x) - y).square().mean(), model=one)
        fabric.backward((two_(x) - y).square().mean(), model=two_)
        second.step()
        second.zero_grad()
        if index % 2:
            first.step()
            first.zero_grad()
    return modules


def teacher(fabric):
    """A frozen model without an optimizer, set up alone."""
    model, student = network(), small(3, INPUTS, OUTPUTS)
    model.requires_grad_(False)
    frozen = fabric.setup(model).eval() if "ddp" not in fabric.strategy.__class__.__name__.lower() else model
    student_model, optimizer = fabric.setup(student, torch.optim.AdamW(student.parameters(), lr=0.01))
    for x, _ in data(fabric):
        fabric.backward((student_model(x) - frozen(x)).square().mean(), model=student_model)
        optimizer.step()
        optimizer.zero_grad()
    return model, student


SCENES = [side_by_side, adversaries, frozen_in_turns, one_loss, clipped, accumulated_in_turns, teacher]


def under_ddp_and(stage, scene):
    results = []
    for strategy in ("ddp", stage):
        fabric = launched(strategy)
        results.append([whole(module) for module in globals()[scene](fabric)])
        fabric.teardown()
    return [apart(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("scene", [scene.__name__ for scene in SCENES])
@pytest.mark.parametrize("stage", STAGES)
def test_equals_ddp(stage, scene, workers):
    for differences in workers(2).run(under_ddp_and, stage, scene):
        assert max(differences) <= 3e-7


def ambiguous(stage):
    fabric = launched(stage)
    _first, (two_, second) = two(fabric, network(), small(3, INPUTS, OUTPUTS))
    x, y = data(fabric)[0]
    loss = (two_(x) - y).square().mean()
    text = message(fabric.backward, loss)
    fabric.backward(loss, model=two_)  # nothing was done before it failed
    second.step()
    fabric.teardown()
    return text


@pytest.mark.parametrize("stage", STAGES)
def test_backward_asks_for_the_model_where_there_are_several(stage, workers):
    for text in workers(2).run(ambiguous, stage):
        assert text.startswith("InvalidArgumentError: ")
        assert "model=" in text


def left_over(stage, options):
    """The generator's backward leaves gradients in the critic, which then goes backward by itself."""
    fabric = launched(stage, options)
    (generator, first), (critic, second) = two(fabric, small(1, OUTPUTS, INPUTS), small(2, INPUTS, 1))
    real, noise = data(fabric)[0]
    fabric.backward((1 - critic(generator(noise))).square().mean(), model=generator)
    first.step()
    text = message(fabric.backward, critic(real).square().mean(), model=critic)
    second.zero_grad()
    fabric.backward(critic(real).square().mean(), model=critic)  # nothing was done before it failed
    second.step()
    fabric.teardown()
    return text


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("offloads", [False, True])
def test_gradients_of_another_models_backward_are_not_dropped_in_silence(stage, offloads, workers):
    options = {"offload_optimizer": True} if offloads else None
    for text in workers(2).run(left_over, stage, options):
        assert text.startswith("UsageError: fabric.backward(): the backward pass through another model has left")
        assert f"stage {stage} would drop them" in text


def unfrozen(stage):
    fabric = launched(stage)
    module = network()
    first = next(iter(module.parameters())).requires_grad_(False)
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    x, y = data(fabric)[0]
    texts = []
    for requires_grad in (False, True):
        first.requires_grad_(requires_grad)
        fabric.backward((model(x) - y).square().mean())
        texts.append(message(optimizer.step))
    fabric.teardown()
    return texts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_was_frozen_at_set_up_cannot_be_trained_later(stage, workers):
    for frozen, later in workers(2).run(unfrozen, stage):
        assert frozen == "nothing was raised"
        assert later.startswith("UsageError: A parameter that was frozen at fabric.setup(model, optimizer)")


def ended(stage):
    """What is left of a model after teardown, when nobody holds it any more."""
    fabric = launched(stage)
    module = small(3, INPUTS, OUTPUTS)
    (model, optimizer), gone = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1)), weakref.ref(module)
    x, y = data(fabric)[0]
    fabric.backward((model(x) - y).square().mean())
    optimizer.step()
    fabric.teardown()
    del model, optimizer, module
    gc.collect()
    return gone() is None


@pytest.mark.parametrize("stage", STAGES)
def test_teardown_gives_the_memory_of_models_back(stage, workers):
    assert workers(2).run(ended, stage) == [True, True]
