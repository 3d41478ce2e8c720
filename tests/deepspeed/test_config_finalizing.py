"""What the program decides is added once it is known: precision, batch size, and that its optimizer is let in."""

import json

import pytest
import torch
from deepspeed_models import assembled, finalized

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.document import advise_on_offload, finalize
from fabric_deepspeed.config.keywords import DEFAULTS


@pytest.mark.parametrize(
    ("precision", "section"),
    [("16-true", "fp16"), ("16-mixed", "fp16"), ("bf16-true", "bf16"), ("bf16-mixed", "bf16"), ("32-true", None)],
)
def test_a_precision_switches_on_its_section(precision, section):
    document = finalized(precision=precision)
    assert {name for name in ("fp16", "bf16") if document.get(name, {}).get("enabled")} == {section} - {None}


def test_another_precision_is_refused():
    with pytest.raises(InvalidArgumentError, match="precision='64-true': expected one of"):
        finalized(precision="64-true")


def test_loss_scaling_follows_the_arguments():
    document = finalized(precision="16-mixed", initial_scale_power=8, hysteresis=3)
    assert document["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 8,
        "loss_scale_window": 1000,
        "hysteresis": 3,
        "min_loss_scale": 1,
    }


def test_loss_scaling_without_float16_is_pointed_out():
    with pytest.warns(UserWarning, match="loss_scale=8: no effect with precision='bf16-mixed'"):
        finalized(precision="bf16-mixed", loss_scale=8)


def test_a_section_of_the_user_stays_as_it_is():
    config = {"fp16": {"enabled": True, "initial_scale_power": 4}}
    assert finalized(config, "16-mixed")["fp16"] == {"enabled": True, "initial_scale_power": 4}
    assert finalized(config, "16-mixed", hysteresis=5)["fp16"]["hysteresis"] == 5


def test_a_section_that_does_not_say_whether_it_is_used_is_used():
    assert finalized({"fp16": {"loss_scale": 8}}, "16-true")["fp16"] == {"loss_scale": 8, "enabled": True}
    assert finalized({"fp16": {"loss_scale": 8}}, "32-true")["fp16"]["enabled"] is False


@pytest.mark.parametrize(
    ("config", "precision", "words"),
    [
        ({"bf16": {"enabled": True}}, "16-mixed", r"bf16\.enabled=True, but precision='16-mixed'.*bf16-mixed"),
        ({"bf16": {"enabled": True}}, "32-true", r"bf16\.enabled=True, but precision='32-true'"),
        ({"fp16": {"enabled": False}}, "16-true", r"fp16\.enabled=False, but precision='16-true'"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "16-mixed", "torch_autocast .*'bf16-mixed'"),
        ({"torch_autocast": {"enabled": True}}, "32-true", "torch_autocast with dtype=None"),
    ],
)
def test_a_section_that_contradicts_the_precision_is_an_error(config, precision, words):
    with pytest.raises(InvalidArgumentError, match=words):
        finalized(config, precision)


def test_the_other_section_may_be_switched_off():
    assert finalized({"fp16": {"enabled": False}}, "bf16-true")["bf16"] == {"enabled": True}


def test_torch_s_autocast_takes_the_place_of_a_section():
    document = finalized({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, "bf16-mixed")
    assert "bf16" not in document


@pytest.mark.parametrize(
    ("config", "typed", "expected"),
    [
        (None, {}, 1),
        (None, {"logging_batch_size_per_gpu": 8}, 8),
        ({"train_micro_batch_size_per_gpu": 4}, {}, 4),
        ({"gradient_accumulation_steps": 4}, {}, 1),
        ({"train_batch_size": 4}, {}, None),
        ({"train_batch_size": 4}, {"logging_batch_size_per_gpu": 2}, 2),
    ],
)
def test_the_batch_size_is_what_somebody_said_else_1(config, typed, expected):
    assert finalized(config, **typed).get("train_micro_batch_size_per_gpu") == expected


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_a_batch_size_is_a_whole_number(size):
    with pytest.raises(InvalidArgumentError, match="logging_batch_size_per_gpu"):
        assembled(logging_batch_size_per_gpu=size)


def test_any_optimizer_is_let_in_unless_the_user_says_otherwise():
    assert finalized({})["zero_allow_untested_optimizer"] is True
    assert finalized({}, zero_allow_untested_optimizer=False)["zero_allow_untested_optimizer"] is False
    assert finalized({"zero_allow_untested_optimizer": False})["zero_allow_untested_optimizer"] is False


def test_torch_s_optimizers_may_run_on_the_cpu_unless_the_user_says_otherwise():
    assert finalized(offload_optimizer=True)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in finalized()
    config = {"zero_optimization": {"stage": 1, "cpu_offload": True}, "zero_force_ds_cpu_optimizer": True}
    assert finalized(config)["zero_force_ds_cpu_optimizer"] is True


def test_gradients_are_clipped_on_demand_only():
    assert finalized()["gradient_clipping"] == 0.0
    assert finalized({"gradient_clipping": None})["gradient_clipping"] == 0.0
    assert finalized({"gradient_clipping": 0.5})["gradient_clipping"] == 0.5


def test_finalizing_again_changes_nothing():
    keywords = {**DEFAULTS, "offload_optimizer": True, "loss_scale": 4}
    once = finalized(precision="16-mixed", offload_optimizer=True, loss_scale=4)
    assert finalize(once, keywords, frozenset(), precision="16-mixed") == once


def test_finalizing_leaves_its_input_alone():
    document = assembled({"fp16": {}})
    before = json.dumps(document)
    finalize(document, DEFAULTS, frozenset(), precision="16-true")
    assert json.dumps(document) == before


def test_what_the_user_edits_in_between_is_checked():
    document = assembled()
    document["zero_optimization"]["offload_param"] = {"device": "cpu"}
    with pytest.raises(InvalidArgumentError, match="stage 3 only"):
        finalize(document, DEFAULTS, frozenset(), precision="32-true")


def test_an_edit_must_not_contradict_an_argument_about_loss_scaling():
    keywords = {**DEFAULTS, "loss_scale": 4}
    with pytest.raises(InvalidArgumentError, match=r"loss_scale=4 was asked for.*fp16\.loss_scale=8"):
        finalize({"fp16": {"loss_scale": 8}}, keywords, frozenset(), precision="16-true")


def test_a_slow_optimizer_for_offloading_is_pointed_out():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    advise_on_offload(finalized(), adam)
    with pytest.warns(UserWarning, match=r"offloaded to cpu, so Adam runs on the CPU.*DeepSpeedCPUAdam"):
        advise_on_offload(finalized(offload_optimizer=True), adam)
