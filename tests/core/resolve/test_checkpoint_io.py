"""Which checkpoint IO ``Fabric(...)`` uses, and how it tells where it came from."""

import pytest

from fabric_core import Fabric
from fabric_core.checkpoint.async_io import AsyncCheckpointIO
from fabric_core.plugins import TorchCheckpointIO
from fabric_core.registry import get_registry
from fabric_core.resolve.pipeline import resolve
from fabric_core.strategies import SingleDeviceStrategy

IO = TorchCheckpointIO()
GIVEN = {
    "a name": (dict(checkpoint_io="async"), AsyncCheckpointIO, ("async", "checkpoint_io='async'")),
    "a name in capitals": (dict(checkpoint_io=" Async"), AsyncCheckpointIO, ("async", "checkpoint_io=' Async'")),
    "the default by name": (dict(checkpoint_io="torch"), TorchCheckpointIO, ("torch", "checkpoint_io='torch'")),
    "an import string": (
        dict(checkpoint_io="fabric_core.plugins:AsyncCheckpointIO"),
        AsyncCheckpointIO,
        ("fabric_core.plugins:AsyncCheckpointIO",),
    ),
    "an object": (
        dict(checkpoint_io=IO),
        TorchCheckpointIO,
        ("TorchCheckpointIO", "argument checkpoint_io=TorchCheckpointIO(...)"),
    ),
    "a class": (dict(checkpoint_io=AsyncCheckpointIO), AsyncCheckpointIO, ("AsyncCheckpointIO",)),
    "a plugin": (
        dict(plugins=[AsyncCheckpointIO()]),
        AsyncCheckpointIO,
        ("AsyncCheckpointIO", "plugins=[AsyncCheckpointIO(...)]"),
    ),
    "an object twice": (
        dict(checkpoint_io=IO, strategy=SingleDeviceStrategy(checkpoint_io=IO)),
        TorchCheckpointIO,
        ("TorchCheckpointIO", "SingleDeviceStrategy(checkpoint_io=...)"),
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "row"), GIVEN.values(), ids=GIVEN)
def test_it_is_used_and_explained(arguments, kind, row):
    fabric = Fabric(accelerator="cpu", devices=1, **arguments)
    assert type(fabric.strategy.checkpoint_io) is kind
    shown = fabric.plan.as_dict()["checkpoint_io"]
    assert (shown["value"], shown["origin"])[: len(row)] == row
    assert "checkpoint_io" in fabric.plan.explain()


def test_a_name_shows_the_distribution_behind_it():
    assert resolve({"checkpoint_io": "async"}).as_dict()["checkpoint_io"]["plugin"].startswith("fabric-core ")


def test_nothing_is_decided_where_nothing_was_asked_for():
    assert "checkpoint_io" not in resolve().as_dict()


REFUSED = {
    "an unknown name": (dict(checkpoint_io="asynk"), ValueError, 'Did you mean "async"'),
    "a wrong type": (dict(checkpoint_io=3), TypeError, r"checkpoint_io=3 \(int\): expected a name such as 'torch'"),
    "a class of another kind": (dict(checkpoint_io=dict), TypeError, "or a CheckpointIO"),
    "argument and plugin": (
        dict(checkpoint_io="async", plugins=TorchCheckpointIO()),
        ValueError,
        r"checkpoint_io is given twice: checkpoint_io='async' and plugins=\[TorchCheckpointIO",
    ),
    "argument and strategy": (
        dict(checkpoint_io="async", strategy=SingleDeviceStrategy(checkpoint_io=TorchCheckpointIO())),
        ValueError,
        r"checkpoint_io='async' and SingleDeviceStrategy\(checkpoint_io",
    ),
    "a name among plugins": (dict(plugins=["async"]), TypeError, "A name is passed as precision= or checkpoint_io="),
}


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Fabric(accelerator="cpu", devices=1, **arguments)


def test_a_plugin_that_makes_something_else_is_to_blame():
    undo = get_registry().register("checkpoint_io", "odd", lambda: 3)
    try:
        with pytest.raises(TypeError, match="made a int, which is no fabric_core"):
            Fabric(accelerator="cpu", devices=1, checkpoint_io="odd")
    finally:
        undo()


def test_a_strategy_that_is_used_again_forgets_the_name_of_the_last_time():
    strategy = SingleDeviceStrategy()
    for name, kind in [("async", AsyncCheckpointIO), (None, TorchCheckpointIO), ("async", AsyncCheckpointIO)]:
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, checkpoint_io=name)
        assert type(fabric.strategy.checkpoint_io) is kind
