"""Typed sections take what can work, and say what was expected otherwise."""

import dataclasses

import pytest

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed import (
    ActivationCheckpointingConfig,
    AioConfig,
    BFloat16Config,
    DeepSpeedConfig,
    Float16Config,
    OptimizerOffloadConfig,
    ParameterOffloadConfig,
    ZeroConfig,
)

DISK = OptimizerOffloadConfig(device="nvme")


def test_a_section_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ZeroConfig().stage = 3


def test_sizes_may_be_written_as_floats():
    assert ZeroConfig(reduce_bucket_size=5e8).section()["reduce_bucket_size"] == 500_000_000
    assert isinstance(ZeroConfig(reduce_bucket_size=5e8).reduce_bucket_size, int)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ZeroConfig(stage=4), r"zero_optimization\.stage=4: expected 0, 1, 2 or 3"),
        (lambda: ZeroConfig(stage=True), "zero_optimization.stage=True"),
        (lambda: ZeroConfig(stage=None), "zero_optimization.stage=None"),
        (lambda: ZeroConfig(reduce_bucket_size=0), "a whole number of at least 1"),
        (lambda: ZeroConfig(reduce_bucket_size=2.5), "a whole number"),
        (lambda: ZeroConfig(reduce_bucket_size=float("inf")), "a whole number"),
        (lambda: ZeroConfig(overlap_comm="yes"), "overlap_comm='yes': expected True or False"),
        (lambda: ZeroConfig(stage=3, offload_param=True), "expected a ParameterOffloadConfig"),
        (
            lambda: ParameterOffloadConfig(device="cuda"),
            r"offload_params_device\)='cuda': expected \"cpu\" or \"nvme\"",
        ),
        (lambda: OptimizerOffloadConfig(device=None), "offload_optimizer_device"),
        (lambda: OptimizerOffloadConfig(nvme_path=""), "nvme_path='': expected the path of a folder"),
        (lambda: ParameterOffloadConfig(buffer_count=0), r"buffer_count \(argument params_buffer_count\)=0"),
        (lambda: AioConfig(intra_op_parallelism=0), r"aio\.intra_op_parallelism \(argument thread_count\)=0"),
        (lambda: Float16Config(loss_scale=-1), "expected a finite number of at least 0"),
        (lambda: Float16Config(loss_scale=float("nan")), "expected a finite number"),
        (lambda: Float16Config(loss_scale_window=0), "loss_scale_window=0"),
    ],
)
def test_a_value_that_cannot_work_is_refused(make, words):
    with pytest.raises(InvalidArgumentError, match=words):
        make()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_offloaded_at_stage_3_only(stage):
    with pytest.raises(InvalidArgumentError, match=f"stage 3 only, this is stage {stage}: use stage=3"):
        ZeroConfig(stage=stage, offload_param=ParameterOffloadConfig())


def test_optimizer_states_that_are_not_split_cannot_be_offloaded():
    with pytest.raises(InvalidArgumentError, match="this is stage 0: use stage=1, 2 or 3"):
        ZeroConfig(stage=0, offload_optimizer=OptimizerOffloadConfig())


@pytest.mark.parametrize("stage", [1, 2])
def test_only_stage_3_uses_a_disk(stage):
    with pytest.raises(InvalidArgumentError, match="NVMe at stage 3 only"):
        ZeroConfig(stage=stage, offload_optimizer=DISK)
    assert ZeroConfig(stage=3, offload_optimizer=DISK).section()["offload_optimizer"]["nvme_path"] == "/local_nvme"


def test_a_disk_needs_a_folder():
    with pytest.raises(InvalidArgumentError, match="needs a folder on that disk: add nvme_path="):
        ParameterOffloadConfig(device="nvme", nvme_path=None)


def test_a_section_holds_what_its_stage_looks_at():
    assert ZeroConfig(stage=0).section() == {"stage": 0}
    assert "sub_group_size" not in ZeroConfig(stage=2).section()
    assert "allgather_bucket_size" not in ZeroConfig(stage=3).section()
    assert OptimizerOffloadConfig().section() == {"device": "cpu", "pin_memory": False}


def test_a_field_without_meaning_at_its_stage_is_refused():
    with pytest.raises(InvalidArgumentError, match="means nothing at stage 2: leave it out, or use stage 3"):
        ZeroConfig(stage=2, sub_group_size=1e9)
    with pytest.raises(InvalidArgumentError, match="or use stage 1 or 2"):
        ZeroConfig(stage=3, allgather_bucket_size=1e9)


def test_contiguous_activations_need_two_more_settings():
    with pytest.raises(InvalidArgumentError, match="partition_activations=True"):
        ActivationCheckpointingConfig(contiguous_memory_optimization=True)
    with pytest.raises(InvalidArgumentError, match="number_checkpoints"):
        ActivationCheckpointingConfig(contiguous_memory_optimization=True, partition_activations=True)


def test_a_fixed_loss_scale_leaves_out_what_a_changing_one_needs():
    assert Float16Config(loss_scale=128).section() == {"enabled": True, "loss_scale": 128}


def test_a_document_is_new_each_time():
    config = DeepSpeedConfig(bf16=BFloat16Config(), more={"gradient_clipping": 0.5})
    config.document()["zero_optimization"]["stage"] = 0
    assert config.document()["zero_optimization"]["stage"] == 2
    assert config.document()["gradient_clipping"] == 0.5


def test_a_section_is_said_in_one_place():
    with pytest.raises(InvalidArgumentError, match="repeats zero_optimization"):
        DeepSpeedConfig(more={"zero_optimization": {"stage": 3}})
