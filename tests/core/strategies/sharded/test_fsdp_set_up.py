"""What set-up makes of a model: who holds which values, in which dtypes, compiled or not."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecision,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from core.strategies.sharded.blocks import Block, Model, close, data, needs_fsdp, sharded, train, trained_alone, whole
from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy


def different_values(sync):
    """The first parameter of models that are different on each rank."""
    fabric = sharded(sync_module_states=sync)
    model = Model()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(fabric.global_rank)
    model = fabric.setup(model)
    return model.module.shift.tolist(), model.module.embedding.weight.to_local().unique().tolist()


@needs_fsdp
def test_ranks_start_from_the_values_of_rank_0_unless_told(workers):
    assert workers(2).run(different_values, True) == [([0.0] * 3, [0.0])] * 2
    assert workers(2).run(different_values, False) == [([0.0] * 3, [0.0]), ([1.0] * 3, [1.0])]


def ignoring(how):
    """Which parameters are split, and whether gradients of those that are not stay each rank's own."""
    model = Model(blocks=2)
    fabric = sharded(
        **{
            "modules": {"ignored_modules": [model.blocks[0]]},
            "states": {"ignored_states": list(model.blocks[0].parameters())},
            "params": {"ignored_params": set(model.blocks[0].parameters())},
        }[how]
    )
    wrapped = fabric.setup(model)
    fabric.backward(wrapped(data()[0] * (1 + fabric.global_rank)).square().mean())
    split = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return split, model.blocks[0].first.weight.grad.tolist(), model.blocks[1].first.weight.grad.full_tensor().tolist()


@needs_fsdp
@pytest.mark.parametrize("how", ["modules", "states", "params"])
def test_ignored_parameters_stay_whole_and_their_gradients_apart(how, workers):
    (split, own, shared), (_, other, same) = workers(2).run(ignoring, how)
    assert not any(name.startswith("blocks.0.") for name in split)
    assert "blocks.1.first.weight" in split
    assert own != other
    assert shared == same


def without_memory():
    """Ignored and sharded parameters of a model from the meta device; what is initialised by the user's function."""
    with torch.device("meta"):
        model = Model(blocks=2)

    def fill(module):
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 2.0)
        for buffer in module.buffers(recurse=False):
            buffer.fill_(3.0)

    wrapped = sharded(ignored_modules=[model.blocks[0]], param_init_fn=fill).setup(model)
    ignored = model.blocks[0].first.weight
    return (
        isinstance(ignored, DTensor),
        ignored.unique().tolist(),
        model.embedding.weight.full_tensor().unique().tolist(),
        model.shift.unique().tolist(),
        wrapped(data()[0]).isfinite().all().item(),
    )


@needs_fsdp
def test_a_function_of_the_users_initialises_what_has_no_memory(workers):
    assert workers(2).run(without_memory) == [(False, [2.0], [2.0], [3.0], True)] * 2


def memory_at_set_up():
    """The largest number of elements that were whole while a model from the meta device was set up."""
    with torch.device("meta"):
        model = Model(blocks=4)
    whole = []

    def fill(module):
        whole.append(sum(p.numel() for p in model.parameters() if not p.is_meta and not isinstance(p, DTensor)))
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            module.shift.zero_()

    sharded(param_init_fn=fill, ignored_modules=[]).setup(model)
    return max(whole), sum(p.numel() for p in Block().parameters())


@needs_fsdp
def test_one_unit_at_a_time_is_whole_during_set_up(workers):
    largest, block = workers(2).run(memory_at_set_up)[0]
    assert largest == block


def given_units():
    """A model whose last block the user sharded."""
    fabric = sharded(auto_wrap_policy={nn.Linear})
    model = Model()
    fully_shard(model.blocks[2], mesh=init_device_mesh("cpu", (2,)))
    with pytest.warns(UserWarning, match="auto_wrap_policy has no effect: Model has units already"):
        trained = train(fabric, model)
    return [n for n, m in model.named_modules() if isinstance(m, FSDPModule)], whole(trained)


@needs_fsdp
def test_units_that_the_user_made_are_left_alone(workers):
    for units, parameters in workers(2).run(given_units_quietly):
        assert units == ["", "blocks.2"]
        assert close(trained_alone(), parameters)


def given_units_quietly():
    if dist.get_rank() == 0:  # warnings come from rank 0
        return given_units()
    fabric = sharded(auto_wrap_policy={nn.Linear})
    model = Model()
    fully_shard(model.blocks[2], mesh=init_device_mesh("cpu", (2,)))
    trained = train(fabric, model)
    return [n for n, m in model.named_modules() if isinstance(m, FSDPModule)], whole(trained)


def wrong_parts():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import distribute_tensor

    fabric = sharded()
    older = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
    with pytest.raises(TypeError, match=r"0 is wrapped in FullyShardedDataParallel.*pass the bare module"):
        fabric.setup(older)
    split = nn.Linear(2, 2)
    split.weight = nn.Parameter(distribute_tensor(split.weight.data, init_device_mesh("cpu", (2,)), [Shard(0)]))
    with pytest.raises(TypeError, match=r"weight is a DTensor.*ModelParallelStrategy"):
        fabric.setup(split)
    scalar = nn.Sequential(nn.Linear(2, 2))
    scalar[0].temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"cannot be cut: 0\.temperature\. Give them the shape \(1,\)"):
        fabric.setup(scalar)
    sharded(ignored_params=[scalar[0].temperature]).setup(scalar)
    assert not isinstance(scalar[0].temperature, DTensor)


@needs_fsdp
def test_modules_sharded_by_other_means_are_refused(workers):
    workers(2).run(wrong_parts)


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)))
        self.register_buffer("scale", torch.ones(4))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.dtype)
        return self.blocks(x) * self.scale


def mixed():
    """Dtypes at work under the older config object, which leaves batch normalisation in float32."""
    config = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16)
    model = WithBatchNorm()
    inside = []
    model.blocks[0][1].register_forward_hook(lambda m, args, out: inside.append((m.weight.dtype, args[0].dtype)))
    wrapped = sharded(mixed_precision=config).setup(model)
    out = wrapped(torch.randn(4, 4))
    out.float().sum().backward()
    norm, linear = model.blocks[0][1], model.blocks[0][0]
    return {
        "root input": model.seen,
        "norm": inside,
        "buffers": (model.scale.dtype, norm.running_mean.dtype),
        "norm is a unit": isinstance(norm, FSDPModule),
        "gradient": linear.weight.grad.dtype,
    }


@needs_fsdp
def test_the_older_config_of_dtypes_means_what_it_did(workers):
    assert workers(2).run(mixed)[0] == {
        "root input": [torch.bfloat16],
        "norm": [(torch.float32, torch.float32)],
        "buffers": (torch.bfloat16, torch.float32),
        "norm is a unit": True,
        "gradient": torch.float32,
    }


def normalised():
    """Training with batch normalisation in every precision."""
    done = []
    for precision in ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"):
        fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision=precision)
        fabric.launch()
        model = WithBatchNorm()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(model(torch.randn(4, 4)).square().mean())
        optimizer.step()
        done.append((precision, model.module.blocks[0][1].running_mean.dtype))
    return done


@needs_fsdp
def test_batch_normalisation_trains_in_every_precision(workers):
    assert workers(2).run(normalised)[0] == [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
    ]


def compiled(checkpointed):
    """How many graphs a stack of blocks is compiled to, and parameters after training."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    policy = {Block} if checkpointed else None
    fabric = sharded(activation_checkpointing_policy=policy)
    module = Model()
    model = train(fabric, torch.compile(module, backend=backend))
    return len(graphs), whole(module), isinstance(module.blocks[0], FSDPModule), list(model.state_dict())


@needs_fsdp
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_are_compiled_one_by_one_and_only_once(checkpointed, workers):
    for graphs, parameters, unit, names in workers(2).run(compiled, checkpointed, timeout=170.0):
        assert close(trained_alone(), parameters)
        assert unit
        assert names == list(Model().state_dict())
        assert graphs == 1  # it serves all blocks


def launch_twice():
    """Joins the process group again after a teardown, with another mesh."""
    strategy = FSDPStrategy(sharding_strategy="NO_SHARD")
    for _ in range(2):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        shape = tuple(strategy.device_mesh.shape)
        fabric.teardown()
    with pytest.raises(RuntimeError, match="launch"):
        strategy.device_mesh  # noqa: B018
    return shape


@needs_fsdp
def test_one_strategy_serves_several_launches(workers):
    assert workers(2).run(launch_twice) == [(2, 1)] * 2
