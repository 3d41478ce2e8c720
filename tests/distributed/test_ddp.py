"""Data parallelism over two processes, held against one process on the same data."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric
from fabric_core.errors import WorkerFailedError
from fabric_core.strategies import DDPStrategy

STEPS, BATCH = 4, 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def training_step(self, x, y):
        return (self(x) - y).pow(2).mean()

    def evaluate(self, x):
        return self.second(torch.tanh(self.first(x)))


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS * BATCH, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def train(devices, optimizer="Adam", clip=False, method=False, **arguments):
    """Parameters and mean loss after one epoch over the data, in batches of the same global size."""
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", **arguments)
    fabric.launch()
    module = Model()
    model, optimizer = fabric.setup(module, getattr(torch.optim, optimizer)(module.parameters(), lr=0.01))
    losses = []
    for x, y in fabric.setup_dataloaders(DataLoader(data(), batch_size=BATCH // devices)):
        loss = model.training_step(x, y) if method else (model(x) - y).pow(2).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        if clip:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        losses.append(fabric.all_reduce(loss.detach()))
    return {n: p.detach().float().numpy() for n, p in model.named_parameters()}, [x.item() for x in losses]


def train_two(options):
    return train(2, **options)


CASES = {
    "32-true": (dict(), 1e-6),
    "SGD": (dict(optimizer="SGD"), 1e-6),
    "clipped": (dict(clip=True), 1e-6),
    "training_step": (dict(method=True), 1e-6),
    "64-true": (dict(precision="64-true"), 1e-6),
    "bf16-mixed": (dict(precision="bf16-mixed", optimizer="SGD"), 2e-3),
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_on_the_same_global_batch(name, workers):
    options, tolerance = CASES[name]
    expected, losses = train(1, **options)
    (first, mean), (second, _) = workers(2).run(train_two, options)
    for key, value in expected.items():
        assert abs(first[key] - value).max() <= tolerance
        assert (first[key] == second[key]).all()
    assert mean == pytest.approx(losses, abs=max(tolerance * 10, 1e-5))


def accumulate(synced):
    """Gradients of one big batch, and of four small ones with the exchange skipped on all but the last."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = fabric.setup(Model())
    x = data().tensors[0][fabric.global_rank :: 2]
    fabric.backward(model(x).pow(2).mean())
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    between = []
    for index, part in enumerate(x.chunk(4)):
        with fabric.no_backward_sync(model, enabled=not synced and index < 3):
            fabric.backward(model(part).pow(2).mean() / 4)
        if index < 3:
            grad = model.first.weight.grad
            between.append(torch.equal(*fabric.all_gather(grad)))
    return [(a - p.grad).abs().max().item() for a, p in zip(expected, model.parameters(), strict=True)], between


@pytest.mark.parametrize("synced", [False, True])
def test_accumulated_gradients_equal_those_of_the_big_batch(synced, workers):
    for differences, same_before_the_last in workers(2).run(accumulate, synced):
        assert max(differences) < 1e-6
        assert same_before_the_last == [synced] * 3


def wrapped():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(fabric.global_rank)
    module = nn.Linear(2, 1)
    model = fabric.setup(module)
    names = sorted(model.state_dict()), sorted(name for name, _ in model.named_parameters())
    inner = type(model._forward_module).__name__, model.module is module
    return names, inner, model.weight.tolist()


def test_the_module_is_wrapped_once_and_starts_from_rank_zero(workers):
    first, second = workers(2).run(wrapped)
    assert first == second
    assert first[:2] == ((["bias", "weight"], ["bias", "weight"]), ("DistributedDataParallel", True))


def frozen():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(fabric.global_rank)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    module[1].running_mean.normal_()
    model = fabric.setup(module)
    x = torch.ones(1, 2, requires_grad=True)
    with fabric.no_backward_sync(model):
        fabric.backward(model.eval()(x).sum())
    return {key: value.tolist() for key, value in model.state_dict().items()}, x.grad.tolist()


def test_a_frozen_module_starts_from_rank_zero_too(workers):
    first, second = workers(2).run(frozen)
    torch.manual_seed(0)
    assert first == second
    assert first[0]["0.weight"] == nn.Linear(2, 2).weight.tolist()


def shards(shuffle, distribute):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    loader = DataLoader(range(10), shuffle=shuffle, batch_size=1)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=distribute)
    return [[int(x) for x in loader] for _ in range(2)]


def test_each_rank_sees_its_share_in_order(workers):
    assert workers(2).run(shards, False, True) == [[[0, 2, 4, 6, 8]] * 2, [[1, 3, 5, 7, 9]] * 2]


def test_shuffled_shares_are_disjoint_complete_and_new_each_epoch(workers):
    one, two = workers(2).run(shards, True, True)
    for epoch in range(2):
        assert sorted(one[epoch] + two[epoch]) == list(range(10))
    assert one[0] != one[1]


def test_without_a_distributed_sampler_every_rank_sees_all(workers):
    assert workers(2).run(shards, False, False) == [[list(range(10))] * 2] * 2


def options():
    strategy = DDPStrategy(bucket_cap_mb=3, gradient_as_bucket_view=True, broadcast_buffers=False)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    ddp = fabric.setup(nn.Linear(2, 1))._forward_module
    return ddp.gradient_as_bucket_view, ddp.broadcast_buffers, ddp.bucket_bytes_cap


def test_arguments_for_torch_arrive(workers):
    assert workers(2).run(options) == [(True, False, 3 * 1024 * 1024)] * 2


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


def branch(strategy):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup(Branching())
    for _ in range(2):
        fabric.backward(model(torch.ones(1, 2)).sum())
    return model.used.weight.grad.tolist()


def test_unused_parameters_are_found_if_asked_for(workers):
    assert workers(2).run(branch, "ddp_find_unused_parameters_true") == [[[2.0, 2.0]]] * 2


def test_unused_parameters_are_an_error_otherwise(workers):
    with pytest.raises(WorkerFailedError, match="find_unused_parameters=True"):
        workers(2).run(branch, "ddp")


def past_the_wrapper():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = fabric.setup(Model())
    try:
        model.evaluate(torch.ones(1, 4))
    except RuntimeError as error:
        refusal = str(error)
    model.mark_forward_method("evaluate")
    fabric.backward(model.evaluate(torch.full((1, 4), float(fabric.global_rank))).sum())
    return refusal, torch.equal(*fabric.all_gather(model.first.weight.grad))


def test_a_method_past_the_wrapper_is_refused_until_marked(workers):
    for refusal, same in workers(2).run(past_the_wrapper):
        assert 'mark_forward_method("evaluate")' in refusal
        assert same


def two_models():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    one, two = fabric.setup(nn.Linear(2, 2)), fabric.setup(nn.Linear(2, 1))
    fabric.backward(two(one(torch.full((1, 2), float(fabric.global_rank)))).sum())
    return all(torch.equal(*fabric.all_gather(p.grad)) for m in (one, two) for p in m.parameters())


def test_several_models_exchange_their_gradients(workers):
    assert workers(2).run(two_models) == [True, True]
