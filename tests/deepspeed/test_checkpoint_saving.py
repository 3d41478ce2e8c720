"""What of a state goes into DeepSpeed's layout, what a filter keeps, and what is refused."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from checkpoint_models import STAGES, Net, apart, inner, launched, message, run, set_up, train, whole

from fabric_core import Fabric

RESERVED = {"module": 1, "optimizer_states": 2, "global_steps": 5, "ds_version": "mine", "fabric": {"a": 1}, "plain": 3}


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def with_values(folder: str, stage: int) -> dict[str, Any]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    head = torch.nn.Linear(2, 2)
    values = {**RESERVED, "counter": Counter(4), "tensor": torch.arange(3), "head": head, "noise": {"a": 1, "b": 2}}
    fabric.save(folder, {"net": model, "adam": optimizer, **values}, filter={"noise": lambda key, _: key == "a"})
    fresh, counter = torch.nn.Linear(2, 2), Counter()
    state: dict[str, Any] = {"net": model, "adam": optimizer, "counter": counter, "module": 0, "head": fresh}
    rest = fabric.load(folder, state)
    steps = fabric.strategy.engines[0].global_steps
    same = apart(head.state_dict(), fresh.state_dict())
    fabric.teardown()
    return {"rest": rest, "counter": counter.count, "module": state["module"], "head": same, "steps": steps}


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_values_come_back_whatever_their_names(stage: int, tmp_path: Any, workers: Any) -> None:
    found = run(workers(2), with_values, str(tmp_path / "ck"), stage)[0]
    rest = found["rest"]
    assert rest.pop("tensor").tolist() == [0, 1, 2]
    expected = {name: value for name, value in RESERVED.items() if name != "module"}
    assert rest == {**expected, "noise": {"a": 1}}
    assert (found["counter"], found["module"], found["head"], found["steps"]) == (4, 1, 0, 2)
    content = Fabric(accelerator="cpu", devices=1).load(tmp_path / "ck", {"net": Net()})
    assert content["fabric"] == {"a": 1}
    assert (content["plain"], content["ds_version"]) == (3, "mine")


def filtered(folder: str, stage: int) -> dict[str, Any]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    both = {"model": model, "optimizer": optimizer}
    before = whole(fabric, model)
    fabric.save(
        folder + "a", {**both, "step": 2}, filter={"model": lambda key, _: "frozen" not in key and key != "mean"}
    )
    strict = message(fabric.load, folder + "a", dict(both))
    fabric.load(folder + "a", dict(both), strict=False)
    fabric.save(folder + "b", {"model": model, "step": 2}, filter={"model": lambda key, value: value.dim() == 2})
    texts = [
        message(fabric.save, folder + "c", dict(both), filter={"model": lambda key, _: "first" not in key}),
        message(fabric.save, folder + "c", dict(both), filter={"optimizer": lambda *_: True}),
        message(fabric.save, folder + "c", dict(both), filter={"modle": lambda *_: True}),
        message(fabric.save, folder + "c", {"step": 1}),
        message(fabric.save, folder + "c", {"model": model, "again": model.module}),
        message(fabric.save, folder + "c", {"optimizer": optimizer}),
        message(fabric.save, "memory://x", dict(both)),
        message(fabric.strategy.save_checkpoint, folder + "c", {}, storage_options={"a": 1}),
        message(fabric.save, folder + "c", {**both, "data": torch.utils.data.DataLoader([1])}),
    ]
    same = apart(before, whole(fabric, model))
    fabric.teardown()
    return {"strict": strict, "texts": texts, "same": same, "weights": before}


@pytest.mark.parametrize("stage", STAGES)
def test_filters_and_refusals(stage: int, tmp_path: Any, workers: Any) -> None:
    results = run(workers(2), filtered, str(tmp_path / "ck"), stage)
    plain = Fabric(accelerator="cpu", devices=1)
    assert sorted(plain.load(tmp_path / "cka")["model"]) == sorted(
        name for name in Net().state_dict() if "frozen" not in name and name != "mean"
    )
    kept = torch.load(tmp_path / "ckb")
    assert (list(kept), kept["step"]) == (["model", "step"], 2)
    assert sorted(kept["model"]) == ["first.weight", "frozen.weight", "one.weight", "two.weight"]
    assert torch.equal(kept["model"]["first.weight"], results[0]["weights"]["first.weight"])
    assert kept["model"]["one.weight"].data_ptr() == kept["model"]["two.weight"].data_ptr()
    for result in results:
        assert result["same"] == 0
        assert "Missing in the checkpoint: mean, frozen.weight, frozen.bias. Pass strict=False" in result["strict"]
        dropped, optimizer, unknown, none, twice, alone, store, options, loader = result["texts"]
        assert dropped.startswith("InvalidArgumentError: filter['model'] leaves out 'first.")
        assert "which the optimizer trains" in dropped
        assert optimizer.startswith("UnsupportedError: filter['optimizer']: DeepSpeed keeps the optimizer's state")
        assert unknown.startswith("InvalidArgumentError: filter names 'modle'")
        assert none.startswith("InvalidArgumentError: The state has 'step', and none of it is a model that was set up")
        assert twice.startswith("InvalidArgumentError: The state names 'model', 'again', which are more than one model")
        assert alone.startswith("InvalidArgumentError: The state has 'optimizer', and none of it is a model")
        assert store.startswith("UnsupportedError: 'memory://x' is in a store")
        assert options.startswith("InvalidTypeError: DeepSpeedStrategy has no storage options, got {'a': 1}")
        assert loader.startswith("InvalidTypeError: state['data'] is a DataLoader")
    assert sorted(os.listdir(tmp_path)) == ["cka", "ckb"]


def without_frozen(folder: str, stage: int) -> list[Any]:
    fabric = launched(stage, exclude_frozen_parameters=True)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    fabric.save(folder, {"model": model, "optimizer": optimizer})
    weights = whole(fabric, model)
    train(fabric, model, optimizer, 2, 4)
    fabric.load(folder, {"model": model, "optimizer": optimizer})
    same = apart(weights, whole(fabric, model))
    fabric.teardown()
    fabric = launched(stage)
    model, _ = set_up(fabric, seed=3)
    text = message(fabric.load, folder, {"model": model})
    fabric.teardown()
    return [same, text]


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_can_be_left_out(stage: int, tmp_path: Any, workers: Any) -> None:
    same, text = run(workers(2), without_frozen, str(tmp_path / "ck"), stage)[0]
    assert same == 0
    assert "Missing in the checkpoint: frozen.weight, frozen.bias." in text
    assert "frozen.weight" not in Fabric(accelerator="cpu", devices=1).load(tmp_path / "ck")["model"]


def through_another_io(folder: str) -> list[str]:
    from fabric_core.checkpoint.async_io import AsyncCheckpointIO

    fabric = launched(2)
    model, optimizer = set_up(fabric)
    fabric.strategy.checkpoint_io = AsyncCheckpointIO()
    text = message(fabric.save, folder, {"model": model, "optimizer": optimizer})
    fabric.save(folder + "2", {"model": model}, filter={"model": lambda *_: True})
    fabric.load(folder + "2", {"model": model})
    fabric.teardown()
    return [text]


def test_another_io_writes_files_only(tmp_path: Any, workers: Any) -> None:
    for (text,) in run(workers(2), through_another_io, str(tmp_path / "ck")):
        assert text.startswith("UnsupportedError: AsyncCheckpointIO writes the checkpoint of one process")
    assert torch.load(tmp_path / "ck2")["model"].keys() == Net().state_dict().keys()


def other_writer(folder: str) -> str:
    from deepspeed.runtime.checkpoint_engine.fast_checkpoint_engine import FastCheckpointEngine

    fabric = launched(2)
    model, optimizer = set_up(fabric)
    engine = inner(model)
    writer, engine.checkpoint_engine = engine.checkpoint_engine, FastCheckpointEngine.__new__(FastCheckpointEngine)
    text = message(fabric.save, folder, {"model": model, "optimizer": optimizer})
    engine.checkpoint_engine = writer
    fabric.teardown()
    return text


def test_a_writer_of_deepspeeds_own_is_refused(tmp_path: Any, workers: Any) -> None:
    for text in run(workers(2), other_writer, str(tmp_path / "ck")):
        assert text.startswith("UnsupportedError: DeepSpeed's config chooses FastCheckpointEngine to write checkpoints")
    assert os.listdir(tmp_path) == []
