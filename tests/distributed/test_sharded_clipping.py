"""Clipping gradients that are split over processes, held against clipping the whole ones."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from distributed.small_model import needs_fsdp
from fabric_core.errors import UsageError
from fabric_core.strategies.clipping import clip_norm, clip_value

ORDERS = [1.0, 2.0, 3.0, math.inf]


def parameter(value, grad):
    made = nn.Parameter(value)
    made.grad = grad
    return made


def split(whole, mesh, placements):
    """A parameter whose gradient is ``whole``, split."""
    grad = distribute_tensor(whole, mesh, placements)
    return parameter(torch.zeros_like(grad), grad)


def wholes(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 4), (4, 6), (8,), (1, 3), (4, 4), (4, 4))
    ]


def parameters(kind, dtype=torch.float32):
    """Parameters that have the gradients above, in many ways of being split."""
    a, b, c, d, e, f = wholes(dtype)
    if kind == "one mesh":  # uneven, and with nothing on some ranks
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        first = [split(t, mesh, [Shard(0)]) for t in (a, b, c, d)]
        return [*first, split(e, mesh, [Replicate()]), parameter(torch.zeros(4, 4), f.clone())]
    if kind == "pending":  # the sum over processes is not done yet
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        share = a * (mesh.get_local_rank() + 1) / sum(range(1, mesh.size() + 1))
        pending = DTensor.from_local(share, mesh, [Partial()], run_check=False)
        alike = parameter(distribute_tensor(torch.zeros(5, 4), mesh, [Shard(0)]), None)
        alike.grad = pending
        other = parameter(distribute_tensor(torch.zeros(5, 4), mesh, [Replicate()]), None)
        other.grad = DTensor.from_local(share.clone(), mesh, [Partial()], run_check=False)
        return [alike, *[split(t, mesh, [Shard(0)]) for t in (b, c, d, e, f)]]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return [
        split(a, mesh, [Shard(0), Shard(1)]),
        split(b, mesh, [Replicate(), Shard(0)]),
        split(c, mesh["data"], [Shard(0)]),
        split(d, mesh["tensor"], [Shard(1)]),
        split(e, mesh, [Shard(0), Shard(0)]),
        split(f, mesh, [Shard(1), Replicate()]),
    ]


def grads(having):
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in having]


def norms(kind):
    results = []
    for order in ORDERS:
        having = parameters(kind)
        norm = clip_norm(having, 0.5, order)
        results.append((norm.item(), tuple(norm.shape), [g.tolist() for g in grads(having)]))
    return results


@pytest.mark.parametrize(("devices", "kind"), [(2, "one mesh"), (4, "one mesh"), (2, "pending"), (4, "several meshes")])
def test_norms_are_those_of_the_whole_gradients(devices, kind, workers):
    for results in workers(devices).run(norms, kind):
        for order, (norm, shape, clipped) in zip(ORDERS, results, strict=True):
            reference = [parameter(torch.zeros_like(g), g.clone()) for g in wholes()]
            assert norm == pytest.approx(clip_norm(reference, 0.5, order).item(), rel=1e-6)
            assert shape == ()
            for ours, p in zip(clipped, reference, strict=True):
                assert torch.allclose(torch.tensor(ours), p.grad, rtol=1e-5)


def values(kind):
    having = parameters(kind)
    clip_value(having, 0.3)
    return [g.tolist() for g in grads(having)]


@pytest.mark.parametrize(("devices", "kind"), [(2, "one mesh"), (2, "pending"), (4, "several meshes")])
def test_values_are_limited_element_by_element(devices, kind, workers):
    for clipped in workers(devices).run(values, kind):
        for ours, whole in zip(clipped, wholes(), strict=True):
            assert torch.allclose(torch.tensor(ours), whole.clamp(-0.3, 0.3))


def nonfinite(bad, order):
    """One rank holds a gradient that is not finite."""
    having = parameters("one mesh")
    if torch.distributed.get_rank() == 1:
        having[0].grad.to_local()[0, 0] = bad
    before = [g.clone() for g in grads(having)]
    try:
        clip_norm(having, 0.5, order)
    except UsageError as error:
        message = str(error)
    untouched = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, grads(having), strict=True))
    norm = clip_norm(having, 0.5, order, error_if_nonfinite=False)
    return message, untouched, norm.isfinite().item()


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_an_error_on_every_rank(bad, order, workers):
    for message, untouched, finite in workers(2).run(nonfinite, bad, order):
        assert message.startswith(f"The {order:g}-norm of the gradients is ")
        assert untouched
        assert not finite


def unusual():
    """Squares that float16 cannot hold, float64, and gradients of which a rank, or nobody, has any."""
    mesh = init_device_mesh("cpu", (2,))
    half = split(torch.full((4,), 300.0, dtype=torch.float16), mesh, [Shard(0)])
    wide = split(torch.full((4,), 3.0, dtype=torch.float64), mesh, [Shard(0)])
    one = split(torch.full((1,), 2.0), mesh, [Shard(0)])
    none = split(torch.zeros(0, 3), mesh, [Shard(0)])
    without = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    norms = [clip_norm(having, 1.0).item() for having in ([half, without], [wide], [one], [none], [without])]
    return norms, clip_norm([one], 1.0, math.inf).item(), str(clip_norm([wide], 1.0).dtype)


def test_unusual_gradients(workers):
    for norms, largest, dtype in workers(2).run(unusual):
        assert norms == pytest.approx([600.0, 6.0, 2.0, 0.0, 0.0])
        assert largest == pytest.approx(1.0)
        assert dtype == "torch.float64"


def messages():
    """How many collectives a norm takes over two meshes that share their axes."""
    having = parameters("several meshes")
    calls = []
    original = torch.distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        clip_norm(having, 0.5)
    finally:
        torch.distributed.all_reduce = original
    return calls


def test_one_small_message_for_each_axis(workers):
    for calls in workers(4).run(messages):
        assert len(calls) == 2
        assert sum(calls) <= 6


def offloaded():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    torch.manual_seed(1)
    for p in module.parameters():
        nn.init.normal_(p)
    mesh = init_device_mesh("cpu", (2,))
    for part in (module[0], module):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    module(torch.ones(2, 4)).sum().backward()
    norm = clip_norm(module.parameters(), 1e-3)
    return norm.item(), clip_norm(module.parameters(), 1.0).item()


@needs_fsdp
def test_gradients_in_the_memory_of_the_cpu(workers):
    torch.manual_seed(1)
    reference = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    torch.manual_seed(1)
    for p in reference.parameters():
        nn.init.normal_(p)
    reference(torch.ones(2, 4)).sum().backward()
    expected = clip_norm(reference.parameters(), 1.0).item()
    for norm, after in workers(2).run(offloaded):
        assert norm == pytest.approx(expected, rel=1e-5)
        assert after == pytest.approx(1e-3, rel=1e-3)


def refused():
    try:
        clip_norm(parameters("one mesh"), 1.0, 0.0)
    except ValueError as error:
        return str(error)
    return None


def test_norms_have_a_positive_order(workers):
    for message in workers(2).run(refused):
        assert message.startswith("norm_type=0.0: gradients that are split have norms of positive order")
