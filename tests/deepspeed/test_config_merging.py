"""Nothing that a user said is dropped in silence: it is used, or it is an error, or a warning."""

import re

import pytest
from deepspeed_models import assembled

from fabric_core.errors import InvalidArgumentError, UnsupportedError
from fabric_deepspeed import DeepSpeedConfig, ZeroConfig

STAGE_2 = {"zero_optimization": {"stage": 2}}


def test_without_a_configuration_the_arguments_say_everything():
    zero = assembled()["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 200_000_000, True)


def test_with_a_configuration_defaults_are_not_used():
    assert assembled(STAGE_2) == STAGE_2
    assert assembled({}) == {}


def test_an_argument_is_added_where_the_configuration_is_silent():
    zero = assembled(STAGE_2, reduce_bucket_size=5e8)["zero_optimization"]
    assert zero == {"stage": 2, "reduce_bucket_size": 500_000_000}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"stage": 3}, r"stage=3 was asked for.*config says zero_optimization\.stage=2"),
        ({"zero_optimization": False}, r"zero_optimization=False was asked for.*zero_optimization\.stage=2"),
        ({"reduce_bucket_size": 3}, r"reduce_bucket_size=3 .*zero_optimization\.reduce_bucket_size=7"),
        ({"offload_optimizer": False}, r"offload_optimizer=False .*offload_optimizer\.device='cpu'"),
        ({"pin_memory": True}, r"pin_memory=True .*offload_optimizer\.pin_memory=False"),
        ({"thread_count": 4}, r"thread_count=4 .*aio\.intra_op_parallelism=2"),
        ({"loss_scale": 4}, r"loss_scale=4 .*fp16\.loss_scale=8"),
        ({"logging_batch_size_per_gpu": 4}, r"logging_batch_size_per_gpu=4 .*train_micro_batch_size_per_gpu=16"),
        ({"zero_allow_untested_optimizer": True}, r"=True .*zero_allow_untested_optimizer=False"),
    ],
)
def test_where_both_speak_they_have_to_agree(typed, words):
    offload = {"device": "cpu", "pin_memory": False}
    config = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "offload_optimizer": offload},
        "aio": {"intra_op_parallelism": 2},
        "fp16": {"loss_scale": 8},
        "train_micro_batch_size_per_gpu": 16,
        "zero_allow_untested_optimizer": False,
    }
    with pytest.raises(InvalidArgumentError, match=words):
        assembled(config, **typed)


def test_agreement_is_no_contradiction():
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8, "offload_optimizer": {"device": "cpu"}}}
    assert assembled(config, stage=2, reduce_bucket_size=200_000_000, offload_optimizer=True) == config


def test_an_argument_may_bring_a_section_along():
    zero = assembled(STAGE_2, offload_optimizer=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    disk = assembled({"zero_optimization": {"stage": 3}}, offload_parameters=True, offload_params_device="nvme")
    assert disk["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/local_nvme"}


def test_arguments_and_configuration_are_judged_together():
    config = {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4}}
    section = assembled(config, contiguous_memory_optimization=True)["activation_checkpointing"]
    assert section == {**config["activation_checkpointing"], "contiguous_memory_optimization": True}


def test_zero_switched_on_beside_a_silent_configuration_has_the_stage_of_the_arguments():
    assert assembled({}, zero_optimization=True) == {"zero_optimization": {"stage": 2}}


def test_an_offload_needs_a_stage_that_the_configuration_has():
    with pytest.raises(InvalidArgumentError, match="this is stage 0"):
        assembled({}, offload_optimizer=True)
    with pytest.raises(InvalidArgumentError, match="this is stage 2"):
        assembled(STAGE_2, offload_parameters=True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"stage": 7}, "stage=7"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "stage 3 only"),
        ({"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "NVMe at stage 3 only"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "needs a folder"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, "device"),
        ({"stage": 3, "offload_param": True}, "expected a dictionary"),
    ],
)
def test_the_configuration_s_own_mistakes_are_found_at_once(config, words):
    with pytest.raises(InvalidArgumentError, match=words):
        assembled({"zero_optimization": config})


def test_what_only_deepspeed_knows_is_left_to_it():
    zero = {"stage": 2, "sub_group_size": 5, "stage3_max_live_parameters": 6, "something_new": 1, "overlap_comm": None}
    config = {"zero_optimization": zero, "gradient_clipping": 1.0, "comms_logger": {"enabled": False}}
    assert assembled(config) == config


def test_stages_and_switches_have_to_fit():
    with pytest.raises(InvalidArgumentError, match="contradict each other"):
        assembled(stage=3, zero_optimization=False)
    with pytest.raises(InvalidArgumentError, match="this is stage 0"):
        assembled(zero_optimization=False, offload_optimizer=True)


def test_zero_switched_off_has_no_section():
    assert "zero_optimization" not in assembled(zero_optimization=False)


@pytest.mark.parametrize(
    ("config", "typed", "words"),
    [
        (None, {"sub_group_size": 5}, "sub_group_size=5: no effect at stage 2, with nothing offloaded"),
        (None, {"stage": 3, "allgather_bucket_size": 5}, "allgather_bucket_size=5: no effect at stage 3"),
        (None, {"offload_optimizer_device": "nvme"}, "offload_optimizer_device='nvme': no effect"),
        (None, {"offload_optimizer": True, "nvme_path": "/x"}, "nvme_path='/x'.*offload_optimizer to cpu"),
        (STAGE_2, {"queue_depth": 5}, "queue_depth=5: no effect at stage 2"),
    ],
)
def test_an_argument_without_effect_is_pointed_out(config, typed, words):
    with pytest.warns(UserWarning, match=words):
        assembled(config, **typed)


def test_a_default_typed_out_is_not_pointed_out():
    assembled(sub_group_size=1e12, nvme_path="/local_nvme")


def test_a_value_that_is_not_the_default_was_typed_by_somebody():
    from fabric_deepspeed.config.document import assemble
    from fabric_deepspeed.config.keywords import DEFAULTS

    with pytest.raises(InvalidArgumentError, match="stage=3 was asked for"):
        assemble(STAGE_2, {**DEFAULTS, "stage": 3}, frozenset())


@pytest.mark.parametrize(("name", "words"), [("optimizer", "torch.optim.AdamW"), ("scheduler", "scheduler=scheduler")])
def test_the_program_makes_optimizer_and_scheduler(name, words):
    with pytest.raises(UnsupportedError, match=f"section '{name}'.*{re.escape(words)}"):
        assembled({name: {"type": "AdamW", "params": {"lr": "auto"}}})


def test_a_typed_configuration_is_taken_like_a_dictionary():
    config = DeepSpeedConfig(ZeroConfig(stage=1), more={"gradient_clipping": 1.0})
    assert assembled(config, offload_optimizer=True)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    with pytest.raises(InvalidArgumentError, match="stage=2 was asked for"):
        assembled(config, stage=2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "none"}}}, "keep the latter"),
        ({"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, r"bfloat16=.*bf16="),
        ({"aio": {"thread_count": 1, "intra_op_parallelism": 2}}, r"thread_count=1.*intra_op_parallelism=2"),
    ],
)
def test_a_key_under_its_old_and_its_new_name_has_to_say_the_same(config, words):
    with pytest.raises(InvalidArgumentError, match=words):
        assembled(config)


def test_zero_as_a_switch_is_stage_1():
    config = {"zero_optimization": True, "allgather_size": 5}
    assert assembled(config) == {"zero_optimization": {"stage": 1, "allgather_bucket_size": 5}}
    assert assembled({"zero_optimization": False}) == {"zero_optimization": {"stage": 0}}
