"""Which arguments were typed is known, and the signature stays what the documentation says."""

import inspect

import pytest
from deepspeed_models import assembled

from fabric_deepspeed import DeepSpeedStrategy
from fabric_deepspeed.config.document import config_keywords
from fabric_deepspeed.config.keywords import DEFAULTS, FLOAT16_PATHS, PATHS, SWITCHES
from fabric_deepspeed.config.typed import remember_typed


class Thing:
    @remember_typed
    def __init__(self, first=1, second=2, *, third=3):
        self.values = (first, second, third)


class Special(Thing):
    def __init__(self, **kwargs):
        super().__init__(7, **kwargs)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Thing(), set()),
        (lambda: Thing(1), {"first"}),
        (lambda: Thing(1, third=3), {"first", "third"}),
        (lambda: Thing(second=2), {"second"}),
        (lambda: Special(third=3), {"first", "third"}),
    ],
)
def test_names_are_those_of_the_arguments_typed(make, names):
    assert make().typed_arguments == names


def test_a_wrong_call_fails_as_python_says():
    with pytest.raises(TypeError, match="unexpected keyword argument 'fourth'"):
        Thing(fourth=4)
    with pytest.raises(TypeError, match="positional argument"):
        Thing(1, 2, 3)


def test_the_signature_shows_the_defaults():
    assert str(inspect.signature(Thing)) == "(first=1, second=2, *, third=3)"


def test_the_strategy_has_the_documented_defaults():
    parameters = inspect.signature(DeepSpeedStrategy).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == dict(DEFAULTS)


def test_every_argument_of_the_dictionary_has_its_keys():
    assert set(PATHS) | set(FLOAT16_PATHS) | set(SWITCHES) == set(DEFAULTS)


def test_other_arguments_are_left_out():
    arguments = {**DEFAULTS, "self": None, "config": None, "timeout": None}
    assert config_keywords(arguments) == dict(DEFAULTS)


def test_the_strategy_knows_what_was_typed():
    assert DeepSpeedStrategy(stage=2, config={}).config == assembled({}, stage=2)
    assert DeepSpeedStrategy(config={}).config == {}
