"""How the transformer is split: matrices over the tensor-parallel devices, what is left over the data-parallel ones.

Attention and perceptron are each a pair of matrix products. The first is split by columns, so that every device
computes some heads, or some features, alone; the second by rows, so that the devices' results only have to be added
(Shoeybi et al., 2019: Megatron-LM). With ``sequence`` the addition leaves each device a part of the sequence, and the
norms in between work on that part (Korthikanti et al., 2022): the same communication, less memory.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model import Transformer


def parallelize(model: nn.Module, mesh: DeviceMesh, sequence: bool = False) -> nn.Module:
    """Split ``model`` in place over ``mesh``, whose dimensions are ``data_parallel`` and ``tensor_parallel``."""
    assert isinstance(model, Transformer)
    tensor_parallel, data_parallel = mesh["tensor_parallel"], mesh["data_parallel"]
    heads = model.config.heads
    if heads % tensor_parallel.size():
        raise SystemExit(f"{heads} heads cannot be split evenly over {tensor_parallel.size()} devices.")
    if tensor_parallel.size() > 1:
        parallelize_module(model, tensor_parallel, outer_plan(sequence))
        for block in model.blocks:
            parallelize_module(block, tensor_parallel, block_plan(sequence))
    if data_parallel.size() > 1:
        # The logits are a view of a DTensor, and what a sharded module returns must not be a view.
        model.head.register_forward_hook(lambda module, inputs, logits: logits.clone())
        for block in model.blocks:
            fully_shard(block, mesh=data_parallel)
        fully_shard(model, mesh=data_parallel)
    return model


def outer_plan(sequence: bool) -> dict[str, ParallelStyle]:
    """For the layers around the blocks. Logits come out whole, as ordinary tensors."""
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "head": ColwiseParallel(input_layouts=stream, output_layouts=Replicate()),
    }
    return plan | {"norm": SequenceParallel()} if sequence else plan


def block_plan(sequence: bool) -> dict[str, ParallelStyle]:
    """For one block, by the names of its parts."""
    stream = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=stream),
        "feed_forward.gate": ColwiseParallel(),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(output_layouts=stream),
    }
    if sequence:
        plan |= {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)),
            "feed_forward_norm": SequenceParallel(),
            "feed_forward": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
        }
    return plan
