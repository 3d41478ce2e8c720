"""The arguments of FSDPStrategy, and what each makes of a model over real processes."""

import inspect
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard

from fabric_core import Fabric
from fabric_core.plugins import FSDPPrecision
from fabric_core.strategies import DDPStrategy, FSDPStrategy

needs_fsdp = pytest.mark.skipif(torch.__version__ < "2.8", reason="torch shards over two axes on CPU from 2.8 on")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Model(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.shift


def data():
    return torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(2))


def train(fabric, model):
    """Parameters after four steps, each rank on its rows of every batch."""
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    for batch in data():
        optimizer.zero_grad()
        fabric.backward(model(batch[fabric.global_rank :: fabric.world_size]).square().mean())
        optimizer.step()
    return model


def whole(model):
    full = ((n, p.full_tensor() if isinstance(p, DTensor) else p) for n, p in model.named_parameters())
    return {name: parameter.detach().numpy().copy() for name, parameter in full}


def sharded(**arguments):
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=FSDPStrategy(**arguments))
    fabric.launch()
    return fabric


def close(expected, found, tolerance=1e-6):
    return all(abs(value - found[name]).max() <= tolerance for name, value in expected.items())


@pytest.fixture(scope="module")
def single():
    return whole(train(Fabric(accelerator="cpu", devices=1), Model()))


def test_the_arguments_are_those_that_users_know():
    names = list(inspect.signature(FSDPStrategy).parameters)
    assert names[:14] == [
        *("accelerator", "parallel_devices", "cluster_environment", "precision", "process_group_backend", "timeout"),
        *("cpu_offload", "mixed_precision", "auto_wrap_policy", "activation_checkpointing"),
        *("activation_checkpointing_policy", "sharding_strategy", "state_dict_type", "device_mesh"),
    ]


@pytest.mark.parametrize(
    ("name", "sharding", "offload"),
    [
        ("fsdp", "FULL_SHARD", None),
        ("fsdp2", "FULL_SHARD", None),
        ("fsdp_cpu_offload", "FULL_SHARD", True),
        ("hsdp", "HYBRID_SHARD", None),
    ],
)
def test_every_name_is_a_preset(name, sharding, offload):
    strategy = Fabric(accelerator="cpu", devices=2, strategy=name).strategy
    assert isinstance(strategy, FSDPStrategy)
    assert strategy.sharding_strategy is ShardingStrategy[sharding]
    assert strategy.cpu_offload is offload
    assert type(strategy.launcher).__name__ == "ScriptLauncher"
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 0}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sharding_strategy": "SOME"}, ValueError, "'SOME' is not known"),
        ({"state_dict_type": "half"}, ValueError, r"state_dict_type='half'\): expected \"full\" or \"sharded\""),
        ({"device_mesh": (1, 2), "process_group": "g"}, ValueError, "Pass one of them"),
        ({"mixed_precision": 16}, TypeError, "mixed_precision=16"),
        ({"cpu_offload": "yes"}, TypeError, "cpu_offload='yes'"),
        ({"auto_wrap_policy": Block}, TypeError, "expected a set of module classes"),
        ({"activation_checkpointing_policy": "Block"}, TypeError, "expected a set of module classes"),
        ({"sharding_stategy": "FULL_SHARD"}, TypeError, "Did you mean 'sharding_strategy'"),
        ({"cpu_offload": True, "offload_policy": True}, ValueError, "are the same argument"),
    ],
)
def test_mistakes_are_found_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        FSDPStrategy(**arguments)


def test_the_newer_names_of_arguments_are_taken():
    mixed, offload = MixedPrecisionPolicy(torch.bfloat16), CPUOffloadPolicy()
    strategy = FSDPStrategy(mp_policy=mixed, offload_policy=offload)
    assert strategy.mixed_precision is mixed
    assert strategy.cpu_offload is offload


def test_dtypes_are_the_users_or_the_precisions():
    mine = MixedPrecision(torch.bfloat16)
    assert FSDPStrategy(mixed_precision=mine, precision=FSDPPrecision("16-true")).mixed_precision_config is mine
    assert FSDPStrategy(precision=FSDPPrecision("16-true")).mixed_precision_config.param_dtype is torch.float16
    assert FSDPStrategy().mixed_precision_config is None or isinstance(FSDPStrategy().precision, FSDPPrecision)


def test_the_mesh_exists_after_the_launch_only():
    with pytest.raises(RuntimeError, match=r"call fabric\.launch\(\) first"):
        FSDPStrategy().device_mesh  # noqa: B018


def test_parts_on_the_cpu_of_a_device_need_gloo_too():
    devices = [torch.device("meta", 0)]
    assert FSDPStrategy(parallel_devices=devices, cpu_offload=True).process_group_backend == "cpu:gloo,meta:gloo"
    assert FSDPStrategy(parallel_devices=devices).process_group_backend == "gloo"
    mine = FSDPStrategy(parallel_devices=devices, cpu_offload=True, process_group_backend="mpi")
    assert mine.process_group_backend == "mpi"
    assert FSDPStrategy(parallel_devices=[torch.device("cpu")], cpu_offload=True).process_group_backend == "gloo"


def test_it_can_be_pickled_before_the_launch():
    strategy = pickle.loads(pickle.dumps(FSDPStrategy(timeout=timedelta(seconds=3), device_mesh=(1, 2))))
    assert strategy.timeout == timedelta(seconds=3)


CASES = {
    "plain": {},
    "shard_grad_op": {"sharding_strategy": "shard_grad_op"},
    "no_shard": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "hybrid": {"sharding_strategy": "HYBRID_SHARD"},
    "hybrid, replicated": {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 1)},
    "hybrid, kept": {"sharding_strategy": "_HYBRID_SHARD_ZERO2", "device_mesh": (1, 2)},
    "prefetch": {"forward_prefetch": True},
    "kept from forward to backward": {"reshard_after_forward": False},
    "freed, the root too": {"reshard_after_forward": True},
    "one unit": {"auto_wrap_policy": set()},
    "nested units": {"auto_wrap_policy": ModuleWrapPolicy({Block, nn.Linear})},
    "cut along columns": {"shard_placement_fn": lambda p: Shard(p.ndim - 1)},
    "offloaded": {"cpu_offload": CPUOffload(offload_params=True)},
    "each rank's own values": {"sync_module_states": False},
    "one unit differs": {
        "auto_wrap_policy": CustomPolicy(
            lambda module: {"sharding_strategy": "SHARD_GRAD_OP"} if isinstance(module, Block) else False
        )
    },
}


def train_cases(names):
    return {name: whole(train(sharded(**CASES[name]), Model())) for name in names}


@needs_fsdp
def test_every_way_to_shard_equals_a_single_process(single, workers):
    for found in workers(2).run(train_cases, list(CASES), timeout=120.0):
        assert {name for name, parameters in found.items() if not close(single, parameters)} == set()


@needs_fsdp
def test_hybrid_over_four_processes_equals_a_single_process(single, workers):
    found = workers(4).run(train_hybrid, timeout=120.0)
    assert all(close(single, parameters) for parameters, _ in found)
    assert {shape for _, shape in found} == {(4, 6)}


def train_hybrid():
    model = train(sharded(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2)), Model())
    return whole(model), tuple(model.module.blocks[0].first.weight.to_local().shape)


def look_at_units():
    """What is a unit, who owns what, and what is freed when."""
    facts = {}
    model = sharded(cpu_offload=False).setup(Model())
    facts["units"] = [name for name, module in model.module.named_modules() if isinstance(module, FSDPModule)]
    facts["local"] = tuple(model.module.blocks[0].first.weight.to_local().shape)
    for name, arguments in {
        "grad_op": {"sharding_strategy": "SHARD_GRAD_OP"},
        "full": {},
        "none": {"sharding_strategy": "NO_SHARD"},
    }.items():
        model = sharded(**arguments).setup(Model())
        model(data()[0])
        facts[f"{name} after forward"] = not isinstance(model.module.blocks[0].first.weight, DTensor)
    facts["not cut"] = tuple(
        sharded(sharding_strategy="NO_SHARD").setup(Model()).module.embedding.weight.to_local().shape
    )
    return facts


@needs_fsdp
def test_blocks_are_units_and_parameters_are_freed_as_asked(workers):
    facts = workers(2).run(look_at_units)[1]
    assert facts.pop("units") == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert facts == {
        "local": (4, 6),
        "not cut": (6, 4),
        "full after forward": False,
        "grad_op after forward": True,
        "none after forward": True,
    }


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
def test_units_that_the_user_made_are_left_alone(single, workers):
    for units, parameters in workers(2).run(given_units_quietly):
        assert units == ["", "blocks.2"]
        assert close(single, parameters)


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
def test_blocks_are_compiled_one_by_one_and_only_once(checkpointed, single, workers):
    for graphs, parameters, unit, names in workers(2).run(compiled, checkpointed, timeout=170.0):
        assert close(single, parameters)
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


def test_it_shares_what_all_parallel_strategies_have():
    assert FSDPStrategy().timeout == DDPStrategy().timeout
    assert FSDPStrategy(process_group_backend="mpi").process_group_backend == "mpi"
