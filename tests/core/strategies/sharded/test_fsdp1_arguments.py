"""What the arguments of the older FSDP become. Nothing here needs a process group."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)

from fabric_core.strategies.sharded.fsdp1_arguments import (
    Dtypes,
    ignored_places,
    read_cpu_offload,
    read_mixed_precision,
    read_options,
    read_overrides,
)
from fabric_core.strategies.sharded.meshes import sharding_named
from fabric_core.warnings import PossibleUserWarning

FULL = sharding_named("FULL_SHARD")


def test_what_fully_shard_does_anyway_passes_in_silence():
    options = read_options(
        "Strategy",
        {"backward_prefetch": BackwardPrefetch.BACKWARD_PRE, "limit_all_gathers": True, "use_orig_params": True},
    )
    assert options.sync_module_states
    assert not options.forward_prefetch


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("backward_prefetch", BackwardPrefetch.BACKWARD_POST, "gathers ahead"),
        ("backward_prefetch", None, "gathers ahead"),
        ("limit_all_gathers", False, "bounded"),
        ("use_orig_params", False, "does not flatten"),
        ("device_id", 0, "Fabric gave it"),
    ],
)
def test_what_has_no_switch_is_accepted_with_the_reason(keyword, value, reason):
    with pytest.warns(PossibleUserWarning, match=rf"Strategy\({keyword}=.*has no effect.*{reason}") as caught:
        read_options("Strategy", {keyword: value})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("auto_wrap_polcy", "Did you mean 'auto_wrap_policy'"),
        ("ignored_module", "Did you mean 'ignored_modules'"),
        ("mesh", "pass device_mesh="),
        ("dp_mesh_dims", "ModelParallelStrategy"),
        ("zzz", "It takes backward_prefetch, .*use_orig_params"),
    ],
)
def test_an_unknown_keyword_is_refused_with_a_hint(keyword, hint):
    with pytest.raises(TypeError, match=f"takes no argument '{keyword}'.*{hint}"):
        read_options("Strategy", {keyword: 1})


def test_no_mixed_precision_asks_for_nothing():
    assert read_mixed_precision(None) == Dtypes()
    assert Dtypes().full is None


def test_the_newer_policy_is_taken_as_it_is():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    dtypes = read_mixed_precision(policy)
    assert dtypes.root is policy
    assert dtypes.unit is policy
    assert dtypes.buffers is None


def test_the_older_one_is_translated():
    dtypes = read_mixed_precision(MixedPrecision(torch.bfloat16, torch.float32, torch.float16))
    assert dtypes.root == MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
    assert dtypes.unit == MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    assert dtypes.buffers is torch.float16
    assert dtypes.full == MixedPrecisionPolicy(torch.float32, torch.float32, torch.bfloat16, cast_forward_inputs=True)


@pytest.mark.parametrize(("root", "units"), [(False, False), (True, False), (True, True), (False, True)])
def test_the_root_casts_its_inputs_if_it_or_everybody_shall(root, units):
    config = MixedPrecision(torch.bfloat16, cast_root_forward_inputs=root, cast_forward_inputs=units)
    dtypes = read_mixed_precision(config)
    assert (dtypes.root.cast_forward_inputs, dtypes.unit.cast_forward_inputs) == (root or units, units)


@pytest.mark.parametrize("config", [MixedPrecision(torch.float16), MixedPrecisionPolicy(torch.float16)])
def test_batch_normalisation_computes_in_full_where_it_can(config):
    dtypes = read_mixed_precision(config)
    assert dtypes.in_full(nn.BatchNorm2d(1))
    assert not dtypes.in_full(nn.BatchNorm2d(1).half())
    assert not dtypes.in_full(nn.LayerNorm(1))


def test_other_classes_may_compute_in_full_instead():
    dtypes = read_mixed_precision(MixedPrecision(torch.float16, _module_classes_to_ignore=[nn.LayerNorm]))
    assert dtypes.in_full(nn.LayerNorm(1))
    assert not dtypes.in_full(nn.BatchNorm2d(1))


def test_in_single_precision_there_is_nothing_to_compute_in_full():
    assert not read_mixed_precision(MixedPrecision(buffer_dtype=torch.bfloat16)).in_full(nn.BatchNorm2d(1))


def test_gradients_of_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"gradients the dtype of their parameters.*bf16-true"):
        read_mixed_precision(MixedPrecision(keep_low_precision_grads=True))


def test_a_precision_by_name_belongs_to_fabric():
    with pytest.raises(TypeError, match=r'mixed_precision=\'16-mixed\'.*Fabric\(precision="bf16-mixed"\)'):
        read_mixed_precision("16-mixed")


@pytest.mark.parametrize("config", [None, False, CPUOffload(), CPUOffload(offload_params=False)])
def test_parts_stay_on_the_device(config):
    assert read_cpu_offload(config, "meta") is None


@pytest.mark.parametrize("config", [True, CPUOffload(offload_params=True), CPUOffloadPolicy()])
def test_memory_is_pinned_for_accelerators_only(config):
    assert read_cpu_offload(config, "cpu") == CPUOffloadPolicy(pin_memory=False)
    assert read_cpu_offload(config, "meta") == CPUOffloadPolicy(pin_memory=True)


def test_memory_is_not_pinned_against_the_users_will():
    assert read_cpu_offload(CPUOffloadPolicy(pin_memory=False), "meta").pin_memory is False


def test_other_policies_for_offloading_are_taken_as_they_are():
    policy = OffloadPolicy()
    assert read_cpu_offload(policy, "cpu") is policy


def test_what_is_no_offloading_is_refused():
    with pytest.raises(TypeError, match=r"cpu_offload='yes'.*CPUOffloadPolicy"):
        read_cpu_offload("yes", "cpu")


def test_one_unit_may_differ_in_dtypes_offloading_and_when_it_is_freed():
    own = read_overrides(
        {
            "mixed_precision": MixedPrecision(torch.bfloat16),
            "cpu_offload": CPUOffload(offload_params=True),
            "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP,
            "forward_prefetch": True,
        },
        FULL,
        "cpu",
    )
    assert own == {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
        "reshard_after_forward": False,
    }


def test_one_unit_may_do_without_what_the_others_have():
    own = read_overrides({"mixed_precision": None, "cpu_offload": None}, FULL, "cpu")
    assert own == {"mp_policy": MixedPrecisionPolicy(), "offload_policy": OffloadPolicy()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "'NO_SHARD' for one unit, while the others have 'FULL_SHARD'"),
        ({"process_group": None}, "process_group=None for one unit. A unit can have its own mixed_precision"),
    ],
)
def test_one_unit_cannot_have_a_mesh_of_its_own(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_overrides(overrides, FULL, "cpu")


def test_ignored_modules_and_parameters_are_found_by_place():
    root = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2)), "c": nn.Linear(2, 2)})
    options = read_options(
        "Strategy",
        {"ignored_modules": iter([root["b"]]), "ignored_states": [root["c"]], "ignored_params": {root["a"].bias}},
    )
    for _ in range(2):  # an iterator that was given is read once, and serves several modules
        modules, places = ignored_places(options, root)
        assert modules == {root["b"], root["b"][0], root["c"]}
        assert places == {
            (root["a"], "bias"),
            *((module, name) for module in (root["b"][0], root["c"]) for name in ("weight", "bias")),
        }


def test_what_is_ignored_is_a_module_or_a_parameter():
    options = read_options("Strategy", {"ignored_states": ["head"]})
    with pytest.raises(TypeError, match=r"ignored_states holds 'head'"):
        ignored_places(options, nn.Linear(1, 1))
