"""State dicts of what ``fabric.setup`` returned: they mean the engine, not the module inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_models import STAGES, Net, launched, message, run, set_up, train

WHOLE: dict[str, Any] = {"config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}


def options(stage: int) -> dict[str, Any]:
    return WHOLE if stage == 3 else {}


def other_weights() -> dict[str, Any]:
    torch.manual_seed(5)
    return Net().state_dict()


def loads_weights(stage: int) -> dict[str, Any]:
    """Weights after a step that changes nothing, from those that were loaded."""
    fabric = launched(stage, **options(stage))
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    differing = model.load_state_dict(other_weights())
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    train(fabric, model, optimizer, 2, 3)
    weights = fabric.strategy.get_module_state_dict(model)
    odd = model.load_state_dict({"scale": torch.ones(1), "else": torch.ones(1)}, strict=False)
    assign = message(lambda: model.load_state_dict(other_weights(), assign=True))
    wrong = message(lambda: model.load_state_dict({}))
    fabric.teardown()
    keys = (list(differing.missing_keys), list(differing.unexpected_keys), "scale" in odd.missing_keys)
    return {"weights": weights, "keys": keys, "odd": odd.unexpected_keys, "assign": assign, "wrong": wrong}


@pytest.mark.parametrize("stage", STAGES)
def test_loaded_weights_are_those_that_are_stepped(workers: Any, stage: int) -> None:
    found = run(workers(2), loads_weights, stage)[0]
    expected = other_weights()
    for name, value in expected.items():
        if name != "seen":
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=0)
    assert found["keys"] == ([], [], False)
    assert found["odd"] == ["else"]
    assert "assign" in found["assign"]
    assert "first.weight" in found["wrong"]


def shows_state(stage: int) -> tuple[str, set[str], bool]:
    fabric = launched(stage, **options(stage))
    model, _ = set_up(fabric)
    error = message(model.state_dict)
    cover, module = (fabric.strategy.get_module_state_dict(one) for one in (model, model.module))
    fabric.teardown()
    equal = cover.keys() == module.keys() and all(torch.equal(cover[key], module[key]) for key in cover)
    return error, set(cover), equal


@pytest.mark.parametrize("stage", STAGES)
def test_the_cover_stands_for_the_engine_and_parts_are_not_taken_for_weights(workers: Any, stage: int) -> None:
    (error, names, equal), (_, others, _) = run(workers(2), shows_state, stage)
    assert equal
    assert names == Net().state_dict().keys()
    assert others == (set() if stage == 3 else names)
    if stage == 3:
        assert "fabric.strategy.get_module_state_dict(model)" in error
    else:
        assert error == "nothing was raised"


def continues(stage: int) -> tuple[list[float], list[float]]:
    """Losses after a step, twice from the same weights and optimizer state."""
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    weights, state = fabric.strategy.get_module_state_dict(model), optimizer.state_dict()
    kept = [{key: value.clone() for key, value in weights.items()}]
    torch.distributed.broadcast_object_list(kept)
    first = train(fabric, model, optimizer, 2, 5)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(state)
    again = train(fabric, model, optimizer, 2, 5)
    fabric.teardown()
    return first, again


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_takes_back_the_state_that_it_gave(workers: Any, stage: int) -> None:
    for first, again in run(workers(2), continues, stage):
        assert again == first
        assert len(set(first)) == 3
