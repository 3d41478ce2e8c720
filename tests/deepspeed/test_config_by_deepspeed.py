"""Every key that is written is one that DeepSpeed knows today, and means there what it was meant to mean."""

import pytest
from deepspeed_models import finalized, reading

NVME = {
    "stage": 3,
    "offload_optimizer": True,
    "offload_parameters": True,
    "offload_optimizer_device": "nvme",
    "offload_params_device": "nvme",
}
CASES = {
    "defaults": {},
    "stage 0": {"stage": 0},
    "no ZeRO": {"zero_optimization": False},
    "stage 1": {"stage": 1},
    "stage 1, offload": {"stage": 1, "offload_optimizer": True},
    "stage 2, offload": {"stage": 2, "offload_optimizer": True, "pin_memory": True},
    "stage 3": {"stage": 3},
    "stage 3, offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "stage 3, disk": {
        **NVME,
        "thread_count": 2,
        "nvme_path": "/mnt/disk",
        "params_buffer_size": 1e6,
        "pin_memory": True,
    },
    "activations": {"partition_activations": True, "cpu_checkpointing": True, "synchronize_checkpoint_boundary": True},
}


def contains(known, document):
    """Whether everything that the document says is what DeepSpeed has read."""
    if isinstance(document, dict):
        return isinstance(known, dict) and all(contains(known.get(name), value) for name, value in document.items())
    return known == document


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("case", CASES)
def test_all_arguments_arrive(case, precision, workers):
    document = finalized(precision=precision, **CASES[case])
    values, warnings = workers(2).run(reading, document)[0]
    assert warnings == []
    assert contains(values, document)


def test_every_field_of_the_typed_sections_arrives(workers):
    from fabric_deepspeed import (
        ActivationCheckpointingConfig,
        AioConfig,
        DeepSpeedConfig,
        Float16Config,
        OptimizerOffloadConfig,
        ParameterOffloadConfig,
        ZeroConfig,
    )

    config = DeepSpeedConfig(
        zero_optimization=ZeroConfig(
            stage=3,
            stage3_prefetch_bucket_size=11,
            stage3_param_persistence_threshold=12,
            stage3_max_live_parameters=13,
            stage3_max_reuse_distance=14,
            stage3_gather_16bit_weights_on_model_save=True,
            offload_optimizer=OptimizerOffloadConfig(device="nvme", nvme_path="/a", buffer_count=6, pin_memory=True),
            offload_param=ParameterOffloadConfig(device="nvme", buffer_count=7, buffer_size=8, max_in_cpu=9),
        ),
        aio=AioConfig(block_size=1, queue_depth=2, intra_op_parallelism=3, single_submit=True, overlap_events=False),
        activation_checkpointing=ActivationCheckpointingConfig(
            partition_activations=True, contiguous_memory_optimization=True, number_checkpoints=4
        ),
        fp16=Float16Config(initial_scale_power=3, loss_scale_window=5, hysteresis=4, min_loss_scale=2),
        more={"gradient_accumulation_steps": 4},
    )
    document = finalized(config, precision="16-true")
    values, warnings = workers(2).run(reading, document)[0]
    assert warnings == []
    assert contains(values, document)
    assert document["zero_optimization"]["offload_param"]["buffer_size"] == 8


def test_keys_of_old_arrive_under_their_present_names(workers):
    old = {
        "zero_optimization": {
            "stage": 3,
            "cpu_offload": True,
            "cpu_offload_param": True,
            "cpu_offload_use_pin_memory": True,
            "stage3_gather_fp16_weights_on_model_save": True,
        },
        "bfloat16": {"enabled": True},
        "aio": {"thread_count": 3},
    }
    values, warnings = workers(2).run(reading, finalized(old, precision="bf16-true"))[0]
    zero = values["zero_optimization"]
    assert warnings == []
    assert (zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == ("cpu", "cpu")
    assert zero["offload_param"]["pin_memory"] is True
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert values["aio"]["intra_op_parallelism"] == 3
    assert values["bf16"]["enabled"] is True
