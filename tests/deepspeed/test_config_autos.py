"""``"auto"`` leaves a value to the program; what nobody knows is asked for, all at once."""

import pytest
from deepspeed_models import assembled, finalized, reading

from fabric_core.errors import InvalidArgumentError

COMMON = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": "auto", "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True, "sub_group_size": 1e9},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize(("precision", "on"), [("16-mixed", "fp16"), ("bf16-true", "bf16"), ("32-true", None)])
def test_the_precision_says_which_section_is_used(precision, on):
    document = finalized(COMMON, precision)
    assert {name for name in ("fp16", "bf16") if document[name]["enabled"]} == {on} - {None}


def test_arguments_say_their_values_typed_or_not():
    assert assembled(COMMON)["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert assembled(COMMON, reduce_bucket_size=3)["zero_optimization"]["reduce_bucket_size"] == 3
    assert finalized(COMMON, "16-mixed")["fp16"]["initial_scale_power"] == 16
    assert finalized(COMMON, "16-mixed", initial_scale_power=9)["fp16"]["initial_scale_power"] == 9


def test_the_batch_is_the_program_s():
    document = finalized(COMMON, logging_batch_size_per_gpu=4)
    assert document["train_micro_batch_size_per_gpu"] == 4
    assert document["gradient_accumulation_steps"] == 1
    assert "train_batch_size" not in document
    assert document["gradient_clipping"] == 0.0


def test_a_stage_may_be_left_to_the_argument():
    config = {"zero_optimization": {"stage": "auto"}}
    assert assembled(config)["zero_optimization"] == {"stage": 2}
    assert assembled(config, stage=3)["zero_optimization"] == {"stage": 3}


def test_a_value_without_meaning_at_the_stage_is_left_out():
    config = {"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}
    assert assembled(config) == {"zero_optimization": {"stage": 2}}


def test_what_nobody_knows_is_listed():
    zero = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    words = r"zero_optimization\.stage3_prefetch_bucket_size, zero_optimization\.stage3_param_persistence_threshold"
    with pytest.raises(InvalidArgumentError, match=words):
        assembled({"zero_optimization": zero})


def test_auto_as_a_word_of_deepspeed_s_own_stays():
    config = {"data_types": {"keep_in_fp32_modules": "auto"}}
    assert assembled(config) == config


@pytest.mark.parametrize("precision", ["16-true", "bf16-mixed", "32-true"])
def test_deepspeed_reads_what_comes_of_it(precision, workers):
    values, warnings = workers(2).run(reading, finalized(COMMON, precision))[0]
    assert warnings == []
    assert values["fp16"]["enabled"] is (precision == "16-true")
    assert values["gradient_accumulation_steps"] == 1
