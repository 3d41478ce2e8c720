"""Setting up sharded modules: optimizers made before, models without memory, who is left without values."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed.small_model import Model, batches, make_strategy, needs_fsdp, whole
from fabric_core import Fabric
from fabric_core.errors import UsageError
from fabric_core.strategies import FSDPStrategy, ModelParallelStrategy

pytestmark = needs_fsdp


def launched(name="FULL_SHARD", devices=2, **options):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=make_strategy(name, devices)[0], **options)
    fabric.launch()
    return fabric


def one_step(fabric, model, optimizer):
    fabric.backward(model.training_step(batches(1, 4)[0]))
    optimizer.step()
    optimizer.zero_grad()
    return [whole(p) for p in model.parameters()]


def orders(name):
    """Parameters after two steps, the optimizer made and set up at different moments."""
    results = []
    for order in ("together", "before", "after", "resumed"):
        fabric = launched(name)
        torch.manual_seed(3)
        module = Model()
        optimizer = None if order == "after" else torch.optim.AdamW(module.parameters(), lr=0.01)
        if order == "resumed":  # with a state from before the set-up
            module.training_step(batches(1, 4)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if order in ("together", "resumed"):
            model, optimizer = fabric.setup(module, optimizer)
        else:
            model = fabric.setup_module(module)
            optimizer = fabric.setup_optimizers(optimizer or torch.optim.AdamW(model.parameters(), lr=0.01))
        if order != "resumed":
            one_step(fabric, model, optimizer)
        results.append(one_step(fabric, model, optimizer))
        ours = {id(p) for p in model.parameters()}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == ours
        assert set(map(id, optimizer.state)) == ours
    return [[torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0], other, strict=True)] for other in results]


@pytest.mark.parametrize("name", ["FULL_SHARD", "tp"])
def test_an_optimizer_may_come_before_or_after(name, workers):
    for by_order in workers(2).run(orders, name):
        assert all(map(all, by_order))


def after_evaluation():
    """An optimizer over the whole parameters that a forward without backward leaves behind."""
    fabric = launched()
    model = fabric.setup_module(Model())
    with torch.no_grad():
        model(batches(1, 4)[0])
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    before = [whole(p).clone() for p in model.parameters()]
    after = one_step(fabric, model, optimizer)
    return sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) / len(after)


def test_an_optimizer_made_after_an_evaluation_trains_the_shards(workers):
    assert workers(2).run(after_evaluation) == [1.0, 1.0]


def strangers(when):
    fabric = launched()
    other = torch.optim.SGD(nn.Linear(5, 2).parameters(), lr=0.1)
    module = Model()
    try:
        if when == "together":
            fabric.setup(module, other)
        else:
            fabric.setup_optimizers(torch.optim.SGD(module.parameters(), lr=0.1))
    except RuntimeError as error:
        return str(error)
    return None


def test_an_optimizer_of_another_module_is_refused(workers):
    for message in workers(2).run(strangers, "together"):
        assert "SGD holds a parameter of shape (2, 5) that belongs to no module set up" in message
    for message in workers(2).run(strangers, "too early"):
        assert "Set up the module first" in message


def leftovers(joint):
    """Whole parameters that are alive after the set-up."""
    fabric = launched()
    module = Model()
    optimizer = torch.optim.AdamW(module.parameters())
    seen = [weakref.ref(p) for p in module.parameters()]
    if joint:
        kept = fabric.setup(module, optimizer)
    else:
        kept = fabric.setup_module(module), fabric.setup_optimizers(optimizer)
    gc.collect()
    return sum(ref() is not None for ref in seen), len(kept)


@pytest.mark.parametrize("joint", [True, False])
def test_nothing_keeps_the_whole_parameters(joint, workers):
    assert workers(2).run(leftovers, joint) == [(0, 2), (0, 2)]


class Partly(nn.Module):
    """Holds tensors that nobody initialises, beside some that somebody does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("seen", torch.ones(3, dtype=torch.int64))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x) * self.scale + self.table)


def whole_fsdp(module, mesh):
    return fully_shard(module, mesh=mesh["data_parallel"])


def partly(strategy):
    strategy = FSDPStrategy() if strategy == "fsdp" else ModelParallelStrategy(whole_fsdp, 2, 1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    with fabric.init_module(empty_init=True):
        module = Partly()
    assert all(t.is_meta for t in module.state_dict().values())
    return fabric, fabric.setup(module)


def missing(strategy):
    fabric, model = partly(strategy)
    messages = []
    for attempt in (lambda: fabric.strategy.check_initialised(model.module), lambda: model(torch.ones(2, 4))):
        for _ in range(2):  # asking again changes nothing
            try:
                attempt()
            except UsageError as error:
                messages.append(str(error))
    return messages


@pytest.mark.parametrize("strategy", ["fsdp", "by hand"])
def test_what_nobody_initialises_is_listed(strategy, workers):
    for messages in workers(2).run(missing, strategy):
        assert len(messages) == 4
        names = "scale, table (a buffer that is not stored in checkpoints), seen"
        assert all("3 parameters or buffers of" in m and f": {names}. They" in m for m in messages)


def like(ours, value):
    return distribute_tensor(value, ours.device_mesh, ours.placements) if isinstance(ours, DTensor) else value


def filled(strategy, how):
    _, model = partly(strategy)
    reference = Partly()
    if how == "loaded":
        ours = model.state_dict()
        model.load_state_dict({name: like(ours[name], value) for name, value in reference.state_dict().items()})
    else:
        with torch.no_grad():
            model.scale.fill_(1.0)
            model.seen += 1
    model.table.copy_(reference.table)
    output = model(torch.ones(2, 4)).isfinite().all().item()
    return output, len(model.module._forward_pre_hooks)


@pytest.mark.parametrize("how", ["loaded", "by hand"])
@pytest.mark.parametrize("strategy", ["fsdp", "by hand"])
def test_a_loader_or_the_user_may_fill_them(strategy, how, workers):
    # one hook is left: that of fully_shard
    assert workers(2).run(filled, strategy, how) == [(True, 1)] * 2


def drawn(devices, name, seeds):
    """Values drawn at set-up, and the random state afterwards."""
    fabric = launched(name, devices)
    with fabric.init_module(empty_init=True):
        module = Model()
    torch.manual_seed(seeds[fabric.global_rank])
    model = fabric.setup(module)
    return [whole(p).tolist() for p in model.parameters()], torch.rand(1).item()


@pytest.mark.parametrize("name", ["FULL_SHARD", "fsdp by hand"])
def test_values_are_those_of_rank_zeros_seed_for_any_number_of_processes(name, workers):
    (two, next_zero), (also_two, next_one) = workers(2).run(drawn, 2, name, [5, 6])
    four = workers(4).run(drawn, 4, name, [5, 5, 8, 5])
    assert two == also_two
    assert all(values == two for values, _ in four)
    torch.manual_seed(6)
    assert next_one == pytest.approx(torch.rand(1).item())  # its own random numbers go on
    assert [number == next_zero for _, number in four] == [True, True, False, True]


def test_tensor_parallel_values_do_not_depend_on_the_number_of_processes(workers):
    (two, _), (also_two, _) = workers(2).run(drawn, 2, "tp", [5, 6])
    (four, _), *_ = workers(4).run(drawn, 4, "tp", [5, 6, 7, 8])
    assert two == also_two == four


def unequal(name):
    """Ranks that were seeded differently and build the module in memory."""
    fabric = launched(name)
    torch.manual_seed(fabric.global_rank)
    model = fabric.setup(Model())
    torch.manual_seed(0)
    return [torch.equal(whole(p), q) for p, q in zip(model.parameters(), Model().parameters(), strict=True)]


@pytest.mark.parametrize("name", ["FULL_SHARD", "fsdp by hand", "tp"])
def test_all_ranks_start_from_rank_zeros_values(name, workers):
    for equal in workers(2).run(unequal, name):
        assert all(equal)


def contexts():
    fabric = launched(precision="bf16-true")
    with fabric.init_module(empty_init=True):
        meta = nn.Linear(2, 2)
    with fabric.init_module():
        real = nn.Linear(2, 2)
    fabric.to_device(meta)
    return meta.weight.is_meta, str(meta.weight.dtype), real.weight.device.type, str(real.weight.dtype)


def test_modules_are_created_without_memory_only_if_asked_for(workers):
    assert workers(2).run(contexts) == [(True, "torch.bfloat16", "cpu", "torch.bfloat16")] * 2


class Stitched(nn.Module):
    """Parents that initialise their children's tensors, after the children have."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.own = nn.Parameter(torch.empty(3))
        self.inner = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.own)
        nn.init.trunc_normal_(self.inner.weight, std=0.02)
        self.inner.bias.data.uniform_()

    def forward(self, x):
        return self.inner(self.attention(x, x, x)[0])


def stitched(blocks):
    def parallelize(module, mesh):
        if blocks:
            fully_shard(module.inner, mesh=mesh["data_parallel"])
        return fully_shard(module, mesh=mesh["data_parallel"])

    fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(parallelize, 2, 1))
    fabric.launch()
    with fabric.init_module(empty_init=True):
        module = Stitched()
    torch.manual_seed(1)
    model = fabric.setup(module)
    return {name: whole(p).numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("blocks", [True, False])
def test_parents_initialise_split_children_as_if_they_were_whole(blocks, workers):
    torch.manual_seed(1)
    reference = Stitched()
    torch.manual_seed(1)
    for part in (reference.attention.out_proj, reference.attention, reference.inner, reference):
        (getattr(part, "reset_parameters", None) or part._reset_parameters)()
    for values in workers(2).run(stitched, blocks):
        for name, expected in reference.named_parameters():
            assert (values[name] == expected.detach().numpy()).all(), name


def held():
    """Bytes that an optimizer over the parameters of the meta device keeps alive while they get memory elsewhere."""
    fabric = launched()
    with fabric.init_module(empty_init=True):
        module = Model()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model = fabric.setup_module(module)
    still_meta = all(p.is_meta for p in parameters)
    optimizer = fabric.setup_optimizers(optimizer)
    ours = {id(p) for p in model.parameters()}
    return still_meta, {id(p) for p in optimizer.param_groups[0]["params"]} == ours


def test_parameters_of_the_meta_device_hold_no_memory_for_those_who_keep_them(workers):
    assert workers(2).run(held) == [(True, True)] * 2


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return x @ self.weight


def built_differently():
    strategy = FSDPStrategy(sync_module_states=False)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    with fabric.init_module(empty_init=fabric.global_rank == 1):
        module = Bare()
    with pytest.raises(UsageError, match=r"Not all ranks built Bare alike.*sync_module_states"):
        fabric.setup_module(module)


def test_ranks_that_build_a_module_differently_are_told(workers):
    workers(2).run(built_differently)
