"""What ``Fabric(...)`` decides for many arguments, and how it tells where each decision came from."""

import dataclasses
import json
import pickle
from typing import ClassVar

import pytest
import torch

from fabric_core import Fabric
from fabric_core.accelerators import CPUAccelerator
from fabric_core.plugins import LightningEnvironment, MixedPrecision, TorchCheckpointIO
from fabric_core.precision import DoublePrecision
from fabric_core.resolve.pipeline import resolve
from fabric_core.strategies import DDPStrategy, SingleDeviceStrategy
from fabric_core.testing import FakeAccelerator

CPU = dict(accelerator="cpu")

#  arguments: {decision: (value, origin, reason)}
PLANS = {
    "nothing said": (
        {},
        {
            "environment": ("default", "auto", "it is the fall-back"),
            "accelerator": ("cpu", "auto", "it is always there"),
            "devices": ("cpu", "auto", "all that cpu counts"),
            "num_nodes": ("1", "default", ""),
            "strategy": ("single_device", "auto", "one device"),
            "precision": ("32-true", "default", ""),
        },
    ),
    "one device": (CPU | dict(devices=1), {"devices": ("cpu", "devices=1", "")}),
    "several devices": (
        CPU | dict(devices=2),
        {"devices": ("2 x cpu", "devices=2", ""), "strategy": ("ddp", "auto", "2 devices")},
    ),
    "a count as text": (CPU | dict(devices="3"), {"devices": ("3 x cpu", "devices='3'", "")}),
    "several nodes": (
        CPU | dict(num_nodes=2),
        {"num_nodes": ("2", "num_nodes=2", ""), "strategy": ("ddp", "auto", "2 nodes")},
    ),
    "a number of nodes as text": (CPU | dict(num_nodes="2"), {"num_nodes": ("2", "num_nodes='2'", "")}),
    "names in capitals": (
        dict(accelerator="CPU", strategy="DDP", precision="BF16-Mixed"),
        {
            "accelerator": ("cpu", "accelerator='CPU'", ""),
            "strategy": ("ddp", "strategy='DDP'", ""),
            "precision": ("bf16-mixed", "precision='BF16-Mixed'", ""),
        },
    ),
    "auto in capitals": (dict(accelerator="AUTO", devices="AUTO", strategy="Auto"), {"strategy": ("single_device",)}),
    "classes": (
        dict(accelerator=CPUAccelerator, strategy=SingleDeviceStrategy, precision=DoublePrecision),
        {"accelerator": ("cpu",), "strategy": ("SingleDeviceStrategy",), "precision": ("DoublePrecision",)},
    ),
    "objects": (
        dict(accelerator=CPUAccelerator(), strategy=SingleDeviceStrategy(), plugins=MixedPrecision("bf16-mixed")),
        {
            "accelerator": ("cpu", "argument accelerator", ""),
            "strategy": ("SingleDeviceStrategy", "argument strategy=SingleDeviceStrategy(...)", ""),
            "precision": ("bf16-mixed", "plugins=[MixedPrecision(...)]", ""),
        },
    ),
    "objects inside a strategy": (
        dict(
            strategy=DDPStrategy(
                accelerator=CPUAccelerator(),
                precision=DoublePrecision(),
                checkpoint_io=TorchCheckpointIO(),
                cluster_environment=LightningEnvironment(),
                parallel_devices=[torch.device("cpu")] * 3,
            )
        ),
        {
            "accelerator": ("cpu", "DDPStrategy(accelerator=...)", ""),
            "precision": ("64-true", "DDPStrategy(precision=...)", ""),
            "checkpoint_io": ("TorchCheckpointIO", "DDPStrategy(checkpoint_io=...)", ""),
            "environment": ("LightningEnvironment", "DDPStrategy(cluster_environment=...)", ""),
            "devices": ("3 x cpu", "DDPStrategy(parallel_devices=...)", ""),
        },
    ),
    "several plugins": (
        dict(plugins=(TorchCheckpointIO(), LightningEnvironment(), DoublePrecision())),
        {"checkpoint_io": ("TorchCheckpointIO",), "environment": ("LightningEnvironment",), "precision": ("64-true",)},
    ),
    "the device of a strategy decides the accelerator": (
        dict(strategy=SingleDeviceStrategy(device="cpu")),
        {"accelerator": ("cpu", "SingleDeviceStrategy(device=...)", "the strategy's devices are cpu")},
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), PLANS.values(), ids=PLANS)
def test_decisions_with_origin_and_reason(arguments, expected, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # where there are several nodes
    monkeypatch.setenv("MASTER_PORT", "29400")
    plugins = arguments.get("plugins")
    plan = resolve({k: v for k, v in arguments.items() if k != "plugins"}, plugins).as_dict()
    for name, wanted in expected.items():
        row = plan[name]
        assert (row["value"], row["origin"], row["reason"])[: len(wanted)] == wanted


def test_every_name_shows_the_distribution_behind_it():
    plan = resolve().as_dict()
    for name in ("environment", "accelerator", "strategy", "precision"):
        assert plan[name]["plugin"].startswith("fabric-core ")
    assert plan["num_nodes"]["plugin"] == ""


def test_a_plan_is_plain_enough_for_json():
    plan = resolve({"devices": 2, "accelerator": "cpu"}, TorchCheckpointIO())
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()


def test_the_table_has_a_line_for_each_decision():
    plan = resolve({"precision": "64-true"})
    head, *lines = plan.explain().splitlines()
    assert head.split() == ["value", "origin", "plugin", "reason"]
    assert [line.split()[0] for line in lines] == list(plan.choices())
    assert any("64-true" in line and "precision='64-true'" in line for line in lines)


def test_the_columns_of_the_table_are_aligned():
    head, *lines = resolve({"accelerator": "cpu", "devices": 2}).explain().splitlines()
    column = head.index("origin")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_a_plan_cannot_be_changed():
    plan = resolve()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.precision = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.precision.name = "64-true"


def test_the_fabric_shows_the_plan_it_was_built_from():
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    assert fabric.strategy is fabric.plan.strategy.value
    assert fabric.accelerator is fabric.plan.accelerator.value
    assert fabric.strategy.precision is fabric.plan.precision.value


def test_a_plan_survives_pickling():
    plan = resolve({"precision": "bf16-mixed"})
    assert pickle.loads(pickle.dumps(plan)).as_dict() == plan.as_dict()


class Watched(FakeAccelerator):
    """Writes down every call that could touch a device."""

    touched: ClassVar = []

    def setup_device(self, device):
        self.touched.append(device)


def test_nothing_touches_a_device_before_the_work_begins(fake_backend):
    fabric = Fabric(accelerator=Watched(), strategy="fake", devices=2)
    assert Watched.touched == []
    assert "setup_environment" not in fabric.strategy.calls
    fabric.launch()
    assert Watched.touched == [torch.device("cpu")]


def test_resolving_connects_nothing(fake_backend):
    plan = resolve({"accelerator": "fake", "strategy": "fake"})
    assert plan.strategy.value.calls == []
    assert plan.build().calls == ["connect"]


def test_building_hands_every_part_to_the_strategy():
    io, precision = TorchCheckpointIO(), DoublePrecision()
    strategy = resolve({"accelerator": "cpu", "devices": 2}, [io, precision]).build()
    assert (strategy.checkpoint_io, strategy.precision) == (io, precision)
    assert strategy.accelerator.name() == "cpu"
    assert (strategy.num_processes, strategy.world_size, strategy.num_nodes) == (2, 2, 1)


def test_several_fabrics_share_nothing():
    one, two = (Fabric(accelerator="cpu", devices=1) for _ in range(2))
    assert one.strategy is not two.strategy
    assert one.strategy.precision is not two.strategy.precision
