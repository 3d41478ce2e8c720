"""Which precision a spelling stands for."""

import pytest

from fabric_core import Fabric
from fabric_core.abc import Precision
from fabric_core.registry import get_registry
from fabric_core.resolve.pipeline import resolve
from fabric_core.strategies import SingleDeviceStrategy


def name(spelling, **arguments):
    return resolve({"accelerator": "cpu", "devices": 1, "precision": spelling, **arguments}).precision.name


@pytest.mark.parametrize(
    ("spelling", "full"),
    [
        (32, "32-true"),
        ("32", "32-true"),
        (64, "64-true"),
        ("64", "64-true"),
        ("32-true", "32-true"),
        (" BF16-True ", "bf16-true"),
        ("16-true", "16-true"),
        (None, "32-true"),
    ],
)
def test_spellings_that_say_what_they_mean(spelling, full):
    assert name(spelling) == full


def test_bf16_means_mixed_with_a_word_of_advice():
    with pytest.warns(UserWarning, match="'bf16' means 'bf16-mixed'.*or 'bf16-true' for 16-bit weights"):
        assert name("bf16") == "bf16-mixed"


@pytest.mark.parametrize("spelling", [16, "16"])
def test_16_means_mixed_with_a_word_of_advice(spelling, fake_backend):
    with pytest.warns(UserWarning, match="mixed") as caught:
        assert name(spelling) == "bf16-mixed"
    first, second = (str(warning.message) for warning in caught)
    assert f"precision={spelling!r} means '16-mixed'" in first
    assert "'16-mixed' does not run on accelerator='cpu'" in second


def test_float16_with_a_scaler_becomes_bfloat16_on_the_cpu():
    with pytest.warns(UserWarning, match="using 'bf16-mixed' instead"):
        choice = resolve({"accelerator": "cpu", "precision": "16-mixed"}).precision
    assert (choice.name, choice.reason) == ("bf16-mixed", "'16-mixed' does not run on cpu")
    assert choice.value.scaler is None


def test_float16_given_as_an_object_stays():
    from fabric_core.plugins import MixedPrecision

    given = MixedPrecision("16-mixed", device="cpu")
    assert resolve({"accelerator": "cpu"}, given).precision.value is given


def test_a_precision_is_made_for_the_accelerators_device():
    class Device(Precision):
        def __init__(self, device):
            self.device = device

    undo = get_registry().register("precision", "needs-device", Device)
    assert resolve({"accelerator": "cpu", "precision": "needs-device"}).precision.value.device == "cpu"
    undo()


class Family(SingleDeviceStrategy):
    precision_family = "sharded"


@pytest.fixture
def family():
    undo = get_registry().register("precision", "sharded.32-true", Precision)
    yield
    undo()


def test_a_family_of_strategies_has_precisions_of_its_own(family):
    choice = resolve({"strategy": Family()}).precision
    assert choice.name == "32-true"


def test_a_precision_that_a_family_lacks_lists_those_it_has(family):
    with pytest.raises(ValueError, match=r"'bf16-mixed' \(fabric-core.*\) does not go with sharded .*take '32-true'"):
        resolve({"strategy": Family(), "precision": "bf16-mixed"})


def test_a_name_that_nothing_has_does_not_exist_for_a_family(family):
    with pytest.raises(ValueError, match="'bf17' does not exist for sharded strategies, which take '32-true'"):
        resolve({"strategy": Family(), "precision": "bf17"})


class Named(Precision):
    precision = "named"

    @classmethod
    def Upper(cls):
        return cls()


@pytest.mark.parametrize("strategy", ["auto", Family()])
def test_an_import_string_keeps_its_case_and_means_the_same_for_every_family(strategy):
    spelling = f"{__name__}:Named.Upper"
    choice = resolve({"accelerator": "cpu", "strategy": strategy, "precision": spelling}).precision
    assert choice.value.precision == "named"


def test_an_object_is_passed_among_the_plugins():
    with pytest.raises(TypeError, match=r"an object, a Particular: pass it as plugins=\[\.\.\.\]"):
        name(Particular())


class Particular(Precision):
    supported_accelerators = frozenset({"cuda"})


def test_a_precision_names_the_accelerators_it_runs_on():
    with pytest.raises(RuntimeError, match=r"does not run on accelerator='cpu'.*It runs on: cuda"):
        Fabric(accelerator="cpu", plugins=Particular())


def test_something_else_under_a_precisions_name_is_the_plugins_defect():
    undo = get_registry().register("precision", "broken", dict)
    with pytest.raises(TypeError, match=r"made a dict, which is no.*defect of that plugin"):
        resolve({"precision": "broken"})
    undo()
