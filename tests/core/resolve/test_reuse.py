"""One strategy object for several ``Fabric`` objects, as when a notebook cell runs again."""

import pytest

from fabric_core import Fabric
from fabric_core.abc import Precision
from fabric_core.plugins import DoublePrecision
from fabric_core.strategies import DDPStrategy, SingleDeviceStrategy


def test_devices_are_resolved_anew():
    strategy = DDPStrategy()
    assert Fabric(accelerator="cpu", strategy=strategy, devices=1).world_size == 1
    assert Fabric(accelerator="cpu", strategy=strategy, devices=2).world_size == 2


def test_a_precision_can_be_given_each_time():
    strategy = SingleDeviceStrategy()
    for name in ("bf16-mixed", "64-true"):
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, precision=name)
        assert fabric.strategy.precision.precision == name


def test_what_the_user_put_into_it_stays():
    own = DoublePrecision()
    strategy = SingleDeviceStrategy(precision=own)
    for _ in range(2):
        assert Fabric(accelerator="cpu", devices=1, strategy=strategy).strategy.precision is own
    with pytest.raises(ValueError, match="precision is given twice"):
        Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=Precision())


@pytest.mark.parametrize(
    ("variable", "text"),
    [("LT_ACCELERATOR", "bogus"), ("LT_STRATEGY", "bogus"), ("LT_PRECISION", "bogus"), ("LT_DEVICES", "bogus")],
)
def test_a_bad_value_from_the_environment_is_blamed_on_the_variable(variable, text, monkeypatch):
    monkeypatch.setenv(variable, text)
    with pytest.raises((ValueError, TypeError), match=f"{variable}={text}"):
        Fabric()
