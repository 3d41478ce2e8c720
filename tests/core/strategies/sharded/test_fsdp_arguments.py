"""The arguments of FSDPStrategy, and the ways to shard over real processes."""

import inspect
import pickle
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard

from core.strategies.sharded.blocks import Block, Model, close, data, needs_fsdp, sharded, train, trained_alone, whole
from fabric_core import Fabric
from fabric_core.plugins import FSDPPrecision
from fabric_core.strategies import DDPStrategy, FSDPStrategy


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
def test_every_way_to_shard_equals_a_single_process(workers):
    for found in workers(2).run(train_cases, list(CASES), timeout=120.0):
        assert {name for name, parameters in found.items() if not close(trained_alone(), parameters)} == set()


@needs_fsdp
def test_hybrid_over_four_processes_equals_a_single_process(workers):
    found = workers(4).run(train_hybrid, timeout=120.0)
    assert all(close(trained_alone(), parameters) for parameters, _ in found)
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


def test_it_shares_what_all_parallel_strategies_have():
    assert FSDPStrategy().timeout == DDPStrategy().timeout
    assert FSDPStrategy(process_group_backend="mpi").process_group_backend == "mpi"
