"""Keys at the top of a configuration that DeepSpeed does not know, and would ignore."""

import warnings

import pytest
from deepspeed_models import assembled

from fabric_deepspeed.config.known import _KNOWN

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("activation_checkpoint", "activation_checkpointing"),
    ],
)
def test_a_slip_is_named_with_the_key_that_was_meant(slip, meant):
    with pytest.warns(UserWarning, match=f"config has the key '{slip}'.* mean '{meant}'") as caught:
        document = assembled({slip: {}})
    assert document[slip] == {}
    assert "fabric_deepspeed" not in caught[0].filename


def test_known_keys_and_those_of_others_are_no_slips():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assembled({"gradient_clipping": 1.0, "steps_per_print": 10, "my_notes": "none", "wandb": {}})


def test_the_keys_that_deepspeed_names_are_known():
    from deepspeed.runtime import constants

    for name in ("TRAIN_BATCH_SIZE", "GRADIENT_CLIPPING", "STEPS_PER_PRINT", "COMMUNICATION_DATA_TYPE", "DUMP_STATE"):
        assert getattr(constants, name) in _KNOWN
