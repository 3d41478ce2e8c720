"""Engines that keep their optimizer in other ways: offloaded, in other orders and dtypes, with a loss scale."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from checkpoint_models import (
    STAGES,
    apart,
    launched,
    loaded_run,
    message,
    run,
    saved_once,
    saved_run,
    set_up,
    stays,
    train,
    whole,
)
from deepspeed_network import half_on_cpu
from packaging.version import Version


@pytest.fixture(scope="module")
def saved(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``saved(stage, precision)`` is the folder that two ranks saved, and what they did then."""
    return saved_once(workers, tmp_path_factory)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 1 with float32 accumulation": (
        "bf16-true",
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "stage 2, groups in turn": ("32-true", {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    "stage 1, aligned": ("bf16-true", {"zero_optimization": {"stage": 1, "parameter_alignment": True}}),
    "stage 2, offloaded": ("32-true", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "stage 3, offloaded": (
        "32-true",
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ),
    "stage 3, small groups": ("32-true", {"zero_optimization": {"stage": 3, "sub_group_size": 20}}),
    "stage 3, nothing kept whole": (
        "32-true",
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    ),
}


def configured(kind: str) -> dict[str, Any]:
    common = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"config": {**KINDS[kind][1], **common}}


def saved_as(folder: str, kind: str) -> dict[str, Any]:
    return saved_run(folder, KINDS[kind][1]["zero_optimization"]["stage"], KINDS[kind][0], **configured(kind))


def loaded_as(folder: str, kind: str) -> dict[str, Any]:
    return loaded_run(folder, KINDS[kind][1]["zero_optimization"]["stage"], KINDS[kind][0], **configured(kind))


OLD = Version(version("deepspeed")) < Version("0.19.5")


@pytest.fixture(params=KINDS)
def kind(request: Any) -> str:
    if OLD and KINDS[request.param][1]["zero_optimization"]["stage"] == 1:
        pytest.skip("older releases know nothing of it")
    return str(request.param)


def test_other_ways_of_keeping_the_optimizer(kind: str, tmp_path: Any, workers: Any) -> None:
    folder = str(tmp_path / "ck")
    before = run(workers(2), saved_as, folder, kind)[0]
    assert stays(before, run(workers(2), loaded_as, folder, kind)[0])
    for to in STAGES:
        after = run(workers(2), loaded_run, folder, to, KINDS[kind][0])[0]
        assert apart(before["weights"], after["weights"]) == 0
        assert apart(before["after"], after["after"]) < 1e-2  # one step of bfloat16, where sums are in another order


def test_and_into_them(kind: str, saved: Any, workers: Any) -> None:
    for stage in (2, 3):
        folder, before = saved(stage, KINDS[kind][0])
        after = run(workers(2), loaded_as, folder, kind)[0]
        assert apart(before["weights"], after["weights"]) == 0
        assert apart(before["after"], after["after"]) < 1e-2


def in_16_bits_without_stages(folder: str) -> dict[str, Any]:
    first = saved_run(folder, 0, "bf16-true")
    again = loaded_run(folder, 0, "bf16-true")
    fabric = launched(2, "bf16-true")
    model, optimizer = set_up(fabric, seed=3)
    text = message(fabric.load, folder, {"model": model, "optimizer": optimizer})
    fabric.load(folder, {"model": model})
    same = apart(first["weights"], whole(fabric, model))
    fabric.teardown()
    fabric = launched(0, "bf16-true")
    model, optimizer = set_up(fabric, seed=3)
    other = message(fabric.load, folder + "2", {"model": model, "optimizer": optimizer})
    fabric.teardown()
    return {"stays": stays(first, again), "text": text, "same": same, "other": other}


@pytest.mark.skipif(OLD, reason="steps of older releases depend on more than what they save")
def test_stage_0_in_16_bits_reads_its_own(tmp_path: Any, workers: Any) -> None:
    run(workers(2), saved_run, str(tmp_path / "ck2"), 2)
    found = run(workers(2), in_16_bits_without_stages, str(tmp_path / "ck"))[0]
    assert found["stays"]
    assert found["same"] == 0
    assert "stage 0 in 16 bits stores it in a form that only the same kind of engine reads" in found["text"]
    assert "reads its optimizer's state from a checkpoint of the same kind of engine only" in found["other"]


def with_loss_scale(folder: str, stage: int) -> list[Any]:
    fabric = launched(stage, "16-true", initial_scale_power=4)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    scaler = fabric.strategy.engines[0].optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter = 32.0, 17
    fabric.save(folder, {"model": model, "optimizer": optimizer})
    fabric.teardown()
    fabric = launched(stage, "16-true", initial_scale_power=4)
    model, optimizer = set_up(fabric)
    live = fabric.strategy.engines[0].optimizer.loss_scaler
    before = live.cur_scale
    fabric.load(folder, {"model": model, "optimizer": optimizer})
    fabric.teardown()
    return [before, live.cur_scale, live.cur_iter]


@pytest.mark.skipif(not half_on_cpu(), reason="DeepSpeed trains in float16 on processors that can")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_loss_scale_goes_along(stage: int, tmp_path: Any, workers: Any) -> None:
    assert run(workers(2), with_loss_scale, str(tmp_path / "ck"), stage)[0] == [16.0, 32.0, 17]
