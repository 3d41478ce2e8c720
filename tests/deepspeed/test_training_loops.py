"""Loops and models as users write them, under every ZeRO stage: the results are those of ddp.

Every function below trains with the Fabric it gets and returns what it trained; it runs under ddp and under the stage.
"""

import pytest
import torch
from deepspeed_network import INPUTS, OUTPUTS, STAGES, apart, batches, launched, network, whole
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


def adam(module, **options):
    return torch.optim.AdamW(module.parameters(), **{"lr": 0.01, **options})


def data(fabric, steps=10):
    return batches(steps, fabric.global_rank, fabric.world_size)


def error(model, x, y):
    return (model(x) - y).square().mean()


def fit(fabric, module, optimizer, forward=error, steps=10):
    """The loop that most of the following share."""
    model, optimizer = fabric.setup(module, optimizer)
    for x, y in data(fabric, steps):
        fabric.backward(forward(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    return module


def two_forwards(fabric):
    module = network()
    return fit(fabric, module, adam(module), lambda model, x, y: error(model, x, y) + error(model, x.flip(0), y))


def frozen(fabric):
    module = network()
    for name in ("weight", "bias"):
        getattr(module[0], name).requires_grad_(False)
    return fit(fabric, module, adam(module))


def frozen_and_left_out(fabric):
    module = network()
    module[3].weight.requires_grad_(False)
    return fit(fabric, module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01))


def only_a_part_is_trained(fabric):
    module = network()
    return fit(fabric, module, adam(module[5]))


def groups(fabric):
    module = network()
    named = list(module.named_parameters())
    weights, biases = ([p for n, p in named if n.endswith(kind)] for kind in ("weight", "bias"))
    return fit(
        fabric, module, torch.optim.AdamW([dict(params=weights), dict(params=biases, weight_decay=0.0, lr=0.02)])
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(INPUTS, 6, bias=False), nn.Linear(6, INPUTS, bias=False)
        self.middle = nn.Linear(6, 6)
        self.down.weight = nn.Parameter(self.up.weight.detach().T.contiguous())
        self.again = self.up

    def forward(self, x):
        return self.middle(torch.tanh(self.again(self.down(torch.tanh(self.middle(self.up(x)))))))[:, :OUTPUTS]


def shared_layers(fabric):
    module = Tied()
    return fit(fabric, module, adam(module))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.middle = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


def tied_weights(fabric):
    def forward(model, x, y):
        tokens = (x.abs() * 5).long().clamp(max=15)
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())

    module = Language()
    return fit(fabric, module, adam(module), forward)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two, self.never = (nn.Linear(INPUTS, OUTPUTS) for _ in range(3))

    def forward(self, x):
        return self.one(x) if x.shape[1] and self.training else self.two(x)


def parts_without_gradients(fabric):
    """Stepped by SGD, for which a gradient of zero is as good as none."""

    def forward(model, x, y):
        model.train(not model.training)
        return error(model, x, y)

    module = Branches()
    return fit(fabric, module, torch.optim.SGD(module.parameters(), lr=0.1), forward)


def buffers(fabric):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(INPUTS, 9), nn.BatchNorm1d(9), nn.Linear(9, OUTPUTS))
    return fit(fabric, module, adam(module))


class Recomputing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x):
        x = checkpoint(self.inner[:3], x.clone().requires_grad_(), use_reentrant=self.reentrant)
        return checkpoint(self.inner[3:], x, use_reentrant=self.reentrant)


def recomputed(fabric):
    module = Recomputing(reentrant=False)
    return fit(fabric, module, adam(module))


def recomputed_by_reentering(fabric):
    module = Recomputing(reentrant=True)
    return fit(fabric, module, adam(module))


def channels_last(fabric):
    """Parameters whose memory is in another order."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2, padding=1), nn.Flatten(), nn.Linear(27, OUTPUTS)
    )
    return fit(fabric, module.to(memory_format=torch.channels_last), adam(module))


def ranks_with_different_values(fabric):
    module = network(seed=1 + fabric.global_rank)
    return fit(fabric, module, adam(module))


def evaluated_on_the_way(fabric):
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for x, y in data(fabric):
        fabric.backward(error(model, x, y))
        model.eval()
        with torch.no_grad():
            before = model(x)
        with torch.inference_mode():
            assert torch.equal(before, model(x))
        model.train()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            assert not torch.equal(before, model(x))
    return module


def gradients_thrown_away(fabric):
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for x, y in data(fabric):
        fabric.backward(error(model, x.flip(0), y))
        optimizer.zero_grad()
        fabric.backward(error(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    return module


def accumulated_and_thrown_away(fabric):
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for x, y in data(fabric):
        with fabric.no_backward_sync(model):
            fabric.backward(error(model, x.flip(0), y))
        optimizer.zero_grad()
        fabric.backward(error(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    return module


def clipped_and_thrown_away(fabric):
    """A clip that no step follows leaves no trace."""
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    for x, y in data(fabric):
        fabric.backward(error(model, x.flip(0), y))
        fabric.clip_gradients(model, optimizer, max_norm=1e-3)
        optimizer.zero_grad()
        fabric.backward(error(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    return module


def last_batch_alone(fabric):
    """Accumulation over three of ten batches: the last step comes earlier."""
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for index, (x, y) in enumerate(data(fabric)):
        last = index % 3 == 2 or index == 9
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(error(model, x, y))
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return module


def scheduled(fabric):
    """A scheduler over what ``setup`` returned, stepped by the loop."""
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    for x, y in data(fabric):
        fabric.backward(error(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.01 * 0.5**3]
    return module


def scheduled_before_set_up(fabric):
    module = network()
    optimizer = adam(module)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
    model, optimizer = fabric.setup(module, optimizer)
    for x, y in data(fabric):
        fabric.backward(error(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    return module


def rates_set_by_hand(fabric):
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for index, (x, y) in enumerate(data(fabric)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (index + 1)
        fabric.backward(error(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    return module


class WithMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x)

    def training_step(self, x, y):
        return error(self, x, y)


def methods_of_the_module(fabric):
    module = WithMethods()
    return fit(fabric, module, adam(module), lambda model, x, y: model.training_step(x, y))


def loaders(fabric):
    x, y = (torch.cat(parts) for parts in zip(*batches(10), strict=True))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            fabric.backward(error(model, x, y))
            optimizer.step()
            optimizer.zero_grad()
    return module


def built_inside(fabric):
    with fabric.init_module():
        module = network()
    return fit(fabric, module, adam(module))


def loss_in_parts(fabric):
    """Two losses of one forward, each with its backward; ddp, which cannot do that, gets their sum."""
    module = network()
    model, optimizer = fabric.setup(module, adam(module))
    for x, y in data(fabric):
        output = model(x)
        first, second = (output - y).square().mean(), output.square().mean()
        if not fabric.strategy.changes_backward:
            first, second = None, first + second
        with fabric.no_backward_sync(model):
            if first is not None:
                fabric.backward(first, retain_graph=True)
        fabric.backward(second)
        optimizer.step()
        optimizer.zero_grad()
    return module


LOOPS = [
    two_forwards,
    frozen,
    frozen_and_left_out,
    only_a_part_is_trained,
    groups,
    shared_layers,
    tied_weights,
    parts_without_gradients,
    buffers,
    recomputed,
    recomputed_by_reentering,
    channels_last,
    ranks_with_different_values,
    evaluated_on_the_way,
    gradients_thrown_away,
    accumulated_and_thrown_away,
    clipped_and_thrown_away,
    last_batch_alone,
    scheduled,
    scheduled_before_set_up,
    rates_set_by_hand,
    methods_of_the_module,
    loaders,
    built_inside,
    loss_in_parts,
]


def under_ddp_and(stage, name):
    """How far the final parameters of both are from each other."""
    results = []
    for strategy in ("ddp", stage):
        torch.manual_seed(5)
        if strategy == "ddp" and name in ("parts_without_gradients", "only_a_part_is_trained"):
            strategy = "ddp_find_unused_parameters_true"
        fabric = launched(strategy)
        results.append(whole(globals()[name](fabric)))
        fabric.teardown()
    return apart(*results)


PAIRS = [(stage, loop.__name__) for loop in LOOPS for stage in (0, *STAGES)]
PAIRS.remove((3, "loss_in_parts"))  # stage 3 gives its parameters' memory back as backward passes through them


@pytest.mark.parametrize(("stage", "loop"), PAIRS)
def test_equals_ddp(stage, loop, workers):
    assert max(workers(2).run(under_ddp_and, stage, loop)) <= 3e-7
