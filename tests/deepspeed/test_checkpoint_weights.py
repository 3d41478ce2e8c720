"""Weights from anywhere into an engine, and whole weights and optimizer states out of it, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_models import STAGES, Net, apart, inner, launched, message, run, set_up, train, whole

from fabric_core.checkpoint.conversion.consolidate import consolidate

FORMS = ["ddp", "fsdp", "consolidated"]


def saved_by(folder: str, how: Any) -> dict[str, Any]:
    """A file of ddp, a sharded folder of fsdp, or a single file of one of DeepSpeed's checkpoints."""
    name = 3 if how == "consolidated" else how
    fabric = launched(name)
    model, optimizer = set_up(fabric, seed=1)
    train(fabric, model, optimizer, 0, 2)
    fabric.save(folder, {"model": model, "optimizer": optimizer, "step": 2})
    weights = whole(fabric, model)
    after = train(fabric, model, optimizer, 2, 5)
    fabric.teardown()
    return {"weights": weights, "losses": after}


@pytest.fixture(scope="module")
def others(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def get(how: str) -> tuple[str, dict[str, Any]]:
        if how not in made:
            path = str(tmp_path_factory.mktemp("others") / "x")
            made[how] = path, run(workers(2), saved_by, path, how)[0]
            if how == "consolidated":
                made[how] = consolidate(path), made[how][1]
        return made[how]  # type: ignore[no-any-return]

    return get


def goes_on(path: str, stage: int, precision: str, weights: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Steps after loading weights, and of a run that had them from the start."""
    fabric = launched(stage, precision, **options)
    model, optimizer = set_up(fabric, seed=3)
    rest = fabric.load(path, {"model": model})
    loaded = whole(fabric, model)
    losses = train(fabric, model, optimizer, 0, 3)
    after = whole(fabric, model)
    fabric.teardown()
    fabric = launched(stage, precision, **options)
    model, optimizer = set_up(fabric, weights=weights)
    its_losses = train(fabric, model, optimizer, 0, 3)
    difference = apart(after, whole(fabric, model))
    fabric.teardown()
    return {"loaded": loaded, "rest": rest, "same losses": losses == its_losses, "difference": difference}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", [0, *STAGES])
def test_the_next_step_goes_on_from_loaded_weights(form: str, stage: int, others: Any, workers: Any) -> None:
    path, there = others(form)
    found = run(workers(2), goes_on, path, stage, "32-true", there["weights"], {})[0]
    assert apart(found["loaded"], there["weights"]) == 0
    assert found["same losses"]
    assert found["difference"] == 0
    assert found["rest"].get("step") == 2


@pytest.mark.parametrize("stage", STAGES)
def test_so_in_bfloat16(stage: int, others: Any, workers: Any) -> None:
    path, there = others("ddp")
    rounded = {n: v.bfloat16().float() if v.is_floating_point() else v for n, v in there["weights"].items()}
    found = run(workers(2), goes_on, path, stage, "bf16-true", rounded, {})[0]
    assert apart({n: v.bfloat16() if v.is_floating_point() else v for n, v in rounded.items()}, found["loaded"]) == 0
    assert found["difference"] < 0.02  # the float32 weights that are stepped have not been rounded


@pytest.mark.parametrize("stage", STAGES)
def test_so_with_offloading(stage: int, others: Any, workers: Any) -> None:
    path, there = others("ddp")
    found = run(workers(2), goes_on_offloaded, path, stage, there["weights"])[0]
    assert apart(found["loaded"], there["weights"]) == 0
    assert found["difference"] == 0


def goes_on_offloaded(path: str, stage: int, weights: dict[str, Any]) -> dict[str, Any]:
    config = {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,
    }
    return goes_on(path, stage, "32-true", weights, {"config": config})


def with_full_weights(path: str) -> dict[str, Any]:
    fabric = launched(3, load_full_weights=True)
    model, _ = set_up(fabric, seed=3)
    fabric.load(path, {"model": model})
    weights = whole(fabric, model)
    fabric.teardown()
    return weights


def test_load_full_weights_at_stage_3(others: Any, workers: Any) -> None:
    path, there = others("ddp")
    for weights in run(workers(2), with_full_weights, path):
        assert apart(weights, there["weights"]) == 0


def raw(path: str, stage: int, folder: str) -> list[Any]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric, seed=3)
    fabric.load_raw(path, model)
    first = whole(fabric, model)
    train(fabric, model, optimizer, 0, 1)
    fabric.load_raw(folder, model)  # a folder, in which the model has a name
    second = whole(fabric, model)
    texts = [message(fabric.load_raw, path, optimizer), message(fabric.load_raw, path + "x", model)]
    fabric.teardown()
    return [first, second, *texts]


@pytest.mark.parametrize("stage", STAGES)
def test_load_raw(stage: int, others: Any, workers: Any, tmp_path: Any) -> None:
    folder, there = others("fsdp")
    torch.save(there["weights"], tmp_path / "weights.pt")
    first, second, optimizer, missing = run(workers(2), raw, str(tmp_path / "weights.pt"), stage, folder)[0]
    assert apart(first, there["weights"]) == apart(second, there["weights"]) == 0
    assert optimizer.startswith("CheckpointError: The checkpoint's content is not the state of an optimizer")
    assert missing.startswith("FileNotFoundError: There is no checkpoint at")


def optimizer_too(path: str, stage: int) -> list[float]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric, seed=3)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    losses = train(fabric, model, optimizer, 2, 5)
    fabric.teardown()
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", [0, *STAGES])
def test_the_optimizer_goes_along(form: str, stage: int, others: Any, workers: Any) -> None:
    path, there = others(form)
    losses = run(workers(2), optimizer_too, path, stage)[0]
    assert max(abs(a - b) for a, b in zip(losses, there["losses"], strict=True)) < 1e-6


def state_dicts(stage: int) -> dict[str, Any]:
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    engine = inner(model)
    moments = fabric.strategy.get_optimizer_state(optimizer.optimizer)
    state = {name: value.clone() for name, value in fabric.strategy.get_module_state_dict(engine).items()}
    everywhere = fabric.broadcast(state)
    losses = train(fabric, model, optimizer, 2, 3)
    fabric.strategy.load_module_state_dict(engine, everywhere)
    back = apart(everywhere, whole(fabric, model))
    wrong = {**everywhere, "scale": torch.ones(2)}
    shapes = message(fabric.strategy.load_module_state_dict, engine, wrong)
    del wrong["scale"]
    keys = message(fabric.strategy.load_module_state_dict, engine, wrong)
    still = apart(everywhere, whole(fabric, model))
    fabric.strategy.load_module_state_dict(engine, wrong, strict=False)
    fabric.teardown()
    return {"state": state, "moments": moments, "losses": losses, "back": (back, still), "texts": (shapes, keys)}


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_whole_states_out_and_in(stage: int, workers: Any) -> None:
    first, second = run(workers(2), state_dicts, stage)
    assert list(first["state"]) == list(Net().state_dict())
    assert (second["state"] == {}) == (stage == 3)
    assert first["back"] == second["back"] == (0, 0)
    for shapes, keys in (first["texts"], second["texts"]):
        assert "scale is (2,) in the checkpoint and (1,) in the module" in shapes
        assert "Missing in the checkpoint: scale. Pass strict=False" in keys
    if stage:
        assert second["moments"] == {}
        assert first["moments"]["state"]["first.weight"]["exp_avg"].shape == (7, 6)
        assert [len(group["params"]) for group in first["moments"]["param_groups"]] == [3, 3]


def moments(how: Any) -> dict[str, Any]:
    fabric = launched(how)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    if how == "ddp":
        names = [name for name, p in inner(model).module.named_parameters() if p.requires_grad]
        by_name = {id(p): name for name, p in inner(model).module.named_parameters()}
        state = {by_name[id(p)]: entries["exp_avg"].clone() for p, entries in optimizer.optimizer.state.items()}
        assert len(state) == len(names)
    else:
        found = fabric.strategy.get_optimizer_state(optimizer.optimizer)
        state = {name: entries["exp_avg"] for name, entries in found.get("state", {}).items()}
    fabric.teardown()
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_the_gathered_optimizer_is_that_of_ddp(stage: int, workers: Any) -> None:
    ours, theirs = run(workers(2), moments, stage)[0], run(workers(2), moments, "ddp")[0]
    assert apart(ours, theirs) < 1e-6


def inference(folder: str, stage: int) -> list[Any]:
    fabric = launched(2)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    fabric.save(folder, {"model": model, "optimizer": optimizer})
    there = whole(fabric, model)
    fabric.teardown()
    fabric = launched(stage)
    torch.manual_seed(9)
    model = fabric.setup_module(Net())
    fabric.load(folder, {"model": model})
    here = whole(fabric, model)
    fabric.save(folder + "2", {"model": model})
    fabric.teardown()
    fabric = launched("ddp")
    plain = fabric.setup_module(Net())
    fabric.load(folder + "2", {"model": plain})
    return [apart(there, here), apart(there, whole(fabric, plain))]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_module_without_an_optimizer(stage: int, workers: Any, tmp_path: Any) -> None:
    assert run(workers(2), inference, str(tmp_path / "ck"), stage)[0] == [0, 0]
