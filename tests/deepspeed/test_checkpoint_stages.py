"""A run goes on from a checkpoint as if it had not stopped: at another stage, on other numbers of processes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_models import (
    STAGES,
    apart,
    launched,
    loaded_run,
    message,
    run,
    saved_once,
    set_up,
    stays,
    train,
    whole,
)

MODEL_ONLY = ("model", "step")


@pytest.fixture(scope="module")
def saved(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``saved(stage, precision)`` is the folder that two ranks saved, and what they did then."""
    return saved_once(workers, tmp_path_factory)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("to", [0, *STAGES])
def test_any_stage_goes_on_at_any_stage_bit_by_bit(stage: int, to: int, saved: Any, workers: Any) -> None:
    folder, before = saved(stage)
    after = run(workers(2), loaded_run, folder, to)[0]
    assert stays(before, after)
    assert (after["step"], after["rest"]) == (3, {})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("to", STAGES)
def test_so_in_bfloat16_with_the_float32_weights(stage: int, to: int, saved: Any, workers: Any) -> None:
    folder, before = saved(stage, "bf16-true")
    assert stays(before, run(workers(2), loaded_run, folder, to, "bf16-true")[0])


@pytest.mark.parametrize("to", [1, 2, 3, "ddp", "fsdp"])
def test_a_run_without_partitions_goes_on_at_any_stage(to: Any, saved: Any, workers: Any) -> None:
    folder, before = saved(0)
    after = run(workers(2), loaded_run, folder, to)[0]
    assert apart(before["weights"], after["weights"]) == 0
    assert apart(before["after"], after["after"]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes", [1, 3])
def test_other_numbers_of_processes(stage: int, processes: int, saved: Any, workers: Any) -> None:
    folder, before = saved(stage)
    for to in STAGES:
        after = run(workers(processes), loaded_run, folder, to)[0]
        assert apart(before["weights"], after["weights"]) == 0
        assert apart(before["after"], after["after"]) < 1e-6  # sums in another order


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("to", ["ddp", "fsdp"])
def test_other_strategies_take_model_and_optimizer(stage: int, to: str, saved: Any, workers: Any) -> None:
    folder, before = saved(stage)
    after = run(workers(2), loaded_run, folder, to)[0]
    assert apart(before["weights"], after["weights"]) == 0
    assert apart(before["after"], after["after"]) < 1e-6
    assert (after["step"], after["rest"]) == (3, {})


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_is_left_alone_unless_asked_for(stage: int, saved: Any, workers: Any) -> None:
    folder, before = saved(stage)
    after = run(workers(2), loaded_run, folder, stage, "32-true", MODEL_ONLY)[0]
    assert apart(before["weights"], after["weights"]) == 0
    assert apart(before["after"], after["after"]) > 1e-3  # a fresh Adam


def back_and_forth(folder: str, stage: int) -> list[Any]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 2}
    fabric.save(folder, state)
    weights = whole(fabric, model)
    first = train(fabric, model, optimizer, 2, 5)
    fabric.load(folder, state)
    back = apart(weights, whole(fabric, model))
    second = train(fabric, model, optimizer, 2, 5)
    fabric.load(folder, state)  # right after a load
    fabric.save(folder, state)
    fabric.load(folder, state)  # right after a save
    third = train(fabric, model, optimizer, 2, 5)
    fabric.teardown()
    return [back, first, second, third]


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_the_same_engine_goes_back_as_often_as_it_likes(stage: int, tmp_path: Any, workers: Any) -> None:
    back, first, second, third = run(workers(2), back_and_forth, str(tmp_path / "ck"), stage)[0]
    assert back == 0
    assert first == second == third


def of_another_kind(folder: str, kind: str, stage: int) -> list[float]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric, kind=kind)
    train(fabric, model, optimizer, 0, 2)
    fabric.save(folder, {"model": model, "optimizer": optimizer})
    losses = train(fabric, model, optimizer, 2, 5)
    fabric.teardown()
    differences = []
    for to in STAGES:
        fabric = launched(to)
        model, optimizer = set_up(fabric, seed=3, kind=kind)
        fabric.load(folder, {"model": model, "optimizer": optimizer})
        its = train(fabric, model, optimizer, 2, 5)
        fabric.teardown()
        differences.append(max(abs(a - b) for a, b in zip(losses, its, strict=True)))
    return differences


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
@pytest.mark.parametrize("stage", [2, 3])
def test_other_optimizers(kind: str, stage: int, tmp_path: Any, workers: Any) -> None:
    assert run(workers(2), of_another_kind, str(tmp_path / "ck"), kind, stage)[0] == [0, 0, 0]


def before_any_step(folder: str, stage: int) -> float:
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    fabric.save(folder, {"model": model, "optimizer": optimizer})
    losses = train(fabric, model, optimizer, 0, 3)
    fabric.load(folder, {"model": model, "optimizer": optimizer})  # its state is to vanish again
    difference = max(abs(a - b) for a, b in zip(losses, train(fabric, model, optimizer, 0, 3), strict=True))
    fabric.teardown()
    return difference


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_has_not_stepped_yet(stage: int, tmp_path: Any, workers: Any) -> None:
    assert run(workers(2), before_any_step, str(tmp_path / "ck"), stage)[0] == 0


def with_scheduler(folder: str, stage: int) -> dict[str, Any]:
    fabric = launched(stage)
    torch.manual_seed(0)
    module = torch.nn.Linear(6, 6)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = fabric.setup(module, optimizer, scheduler=scheduler)
    train(fabric, model, optimizer, 0, 2)
    rate = optimizer.param_groups[0]["lr"]
    fabric.save(folder, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 2})
    train(fabric, model, optimizer, 2, 4)
    later = scheduler.last_epoch
    fabric.load(folder, {"model": model, "optimizer": optimizer, "step": 0})
    untouched = scheduler.last_epoch
    rest = fabric.load(folder, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    steps = fabric.strategy.engines[0].global_steps
    fabric.teardown()
    return {
        "rates": (rate, optimizer.param_groups[0]["lr"]),
        "epochs": (later, untouched, scheduler.last_epoch),
        "rest": rest,
        "steps": steps,
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_scheduler_is_restored_if_it_is_asked_for(stage: int, tmp_path: Any, workers: Any) -> None:
    found = run(workers(2), with_scheduler, str(tmp_path / "ck"), stage)[0]
    assert found["rates"][0] == found["rates"][1] == 0.025
    assert found["epochs"] == (4, 4, 2)
    assert (found["rest"], found["steps"]) == ({"step": 2}, 2)


def into_another_model(folder: str, stage: int) -> list[Any]:
    fabric = launched(stage)
    torch.manual_seed(7)
    module = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 2))
    model, _ = fabric.setup(module, torch.optim.AdamW(module.parameters()))
    before = whole(fabric, model)
    texts = [message(fabric.load, folder, state) for state in ({"model": model}, {"model": model, "epoch": 1})]
    other, its_optimizer = set_up(fabric, split_groups=False)
    texts.append(message(fabric.load, folder, {"model": other, "optimizer": its_optimizer}))
    unchanged = apart(before, whole(fabric, model))
    fabric.teardown()
    return [*texts, unchanged]


@pytest.mark.parametrize("stage", STAGES)
def test_what_does_not_fit_is_named_and_nothing_is_changed(stage: int, saved: Any, workers: Any) -> None:
    for model, names, groups, unchanged in run(workers(2), into_another_model, saved(stage)[0], stage):
        assert "Nothing was loaded. Missing in the checkpoint: 0.weight, 0.bias, 1.weight, 1.bias." in model
        assert "Unknown to the module: scale, seen, mean, first.weight, first.bias, frozen.weight" in model
        assert names.startswith(
            "CheckpointKeyError: The checkpoint has no 'epoch'; it has 'model', 'optimizer', 'step'"
        )
        assert "the parameters of one group were in groups [0, 1] of different options" in groups
        assert unchanged == 0
