"""Which memory of a tensor that is spread over processes is this one's."""

import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fabric_core.checkpoint.dtensors import local_of, part_for


def parts():
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    for shape, placement in itertools.product([(5, 3), (1, 7)], [Replicate(), Shard(0), Shard(1)]):
        whole = torch.arange(15.0)[: torch.Size(shape).numel()].view(shape)
        spread = distribute_tensor(whole.clone(), mesh, [placement])
        part, memory = part_for(whole, spread)
        assert torch.equal(part, spread.to_local())
        assert type(memory) is torch.Tensor
        memory.copy_(part * 2)
        assert torch.equal(spread.full_tensor(), whole * 2)
    pending = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]).redistribute(mesh, [Replicate()], async_op=True)
    arrived = local_of(pending)
    return type(pending.to_local()).__name__, type(arrived).__name__, arrived.tolist()


def test_what_is_still_on_its_way_is_waited_for(workers):
    for before, after, values in workers(2).run(parts):
        assert (before, after) == ("AsyncCollectiveTensor", "Tensor")
        assert values == list(range(6))


def outside():
    mesh = DeviceMesh("cpu", [0])
    for whole in (torch.ones(2, 3), torch.tensor(1.0)):
        spread = DTensor.from_local(whole.clone() * 0, mesh, [Replicate()], run_check=False)
        part, memory = part_for(whole, spread)
        memory.copy_(part)
        expected = whole.numel() if dist.get_rank() == 0 else 0
        assert (memory.sum().item(), part.dtype) == (expected, whole.dtype)


def test_a_process_outside_of_the_mesh_holds_nothing(workers):
    workers(2).run(outside)
