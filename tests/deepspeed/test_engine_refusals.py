"""Optimizers that do not fit their module, releases that keep things elsewhere, and what DeepSpeed need not say."""

import logging
import warnings

import pytest
import torch
from deepspeed_network import batches, launched, message, network
from torch import nn


def alien(stage):
    """An optimizer over another module, then one over its own, after which training works."""
    fabric = launched(stage)
    text = message(fabric.setup, network(), torch.optim.SGD(network().parameters(), lr=0.1))
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x, _ = batches(1)[0]
    fabric.backward(model(x).mean())
    optimizer.step()
    fabric.teardown()
    return text


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_optimizer_over_another_module_is_refused(stage, workers):
    for text in workers(2).run(alien, stage):
        assert text.startswith("InvalidArgumentError: ")
        assert "8 of the optimizer's 8 parameters" in text
        assert "model.parameters()" in text


def group_added(stage, path):
    """Adding parameters that are not the model's, and saving; and adding them when the engine is no more."""
    fabric = launched(stage)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    more = {"params": list(nn.Linear(2, 2).parameters())}
    added = message(optimizer.add_param_group, more)
    saved = message(fabric.save, path / "saved", {"model": model, "optimizer": optimizer})
    groups = len(optimizer.param_groups)
    fabric.teardown()
    return added, saved, groups, "add_param_group" in vars(optimizer.optimizer)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_group_can_be_added_after_set_up(stage, workers, tmp_path):
    for added, saved, groups, marked in workers(2).run(group_added, stage, tmp_path):
        assert added.startswith("UsageError: ")
        assert "before fabric.setup(model, optimizer)" in added
        assert (saved, groups, marked) == ("nothing was raised", 1, False)


def group_appended(stage):
    fabric = launched(stage)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": list(nn.Linear(2, 2).parameters())})
    before = {name: value.clone() for name, value in fabric.strategy.get_module_state_dict(model).items()}
    fabric.backward(model(batches(1)[0][0]).mean())
    stepped = message(optimizer.step)
    optimizer.param_groups.pop()
    after = fabric.strategy.get_module_state_dict(model)
    fabric.teardown()
    return stepped, all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_nor_appended_to_the_list(stage, workers):
    for stepped, same in workers(2).run(group_appended, stage):
        assert stepped.startswith("UsageError: optimizer.param_groups was changed after fabric.setup(...)")
        assert same


def test_with_whole_states_a_group_of_others_is_not_saved(workers, tmp_path):
    for added, saved, groups, _ in workers(2).run(group_added, 0, tmp_path):
        assert (added, groups) == ("nothing was raised", 2)
        assert saved.startswith("UsageError: ")
        assert "none of the model's" in saved
    assert not (tmp_path / "saved").exists()


def moved_away(stage, name):
    """Where an attribute of DeepSpeed's optimizer has another name."""
    from fabric_deepspeed.checkpoint.live import flat_optimizer

    fabric = launched(stage)
    module = network()
    fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    engine = fabric.strategy.model
    value = engine.optimizer.__dict__.pop(name)
    text = message(flat_optimizer, engine)
    setattr(engine.optimizer, name, value)
    again = message(flat_optimizer, engine)
    fabric.teardown()
    return text, again


@pytest.mark.parametrize(
    ("stage", "name"),
    [(1, "single_partition_of_fp32_groups"), (3, "fp32_partitioned_groups_flat"), (3, "sub_group_to_group_id")],
)
def test_a_release_that_keeps_weights_elsewhere_is_named(stage, name, workers):
    import deepspeed

    for text, again in workers(2).run(moved_away, stage, name):
        assert text.startswith(f"IncompatiblePluginError: DeepSpeed {deepspeed.__version__} keeps ")
        assert again == "nothing was raised"


def said(stage):
    """What DeepSpeed's log and torch's warnings say during set-up and one step."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric = launched(stage)
        module = network()
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        x, _ = batches(1)[0]
        fabric.backward(model(x).mean())
        optimizer.step()
        logger.warning("ZeRO with an untested optimizer")
        fabric.teardown()
    logger.removeHandler(handler)
    return records, [str(one.message) for one in caught if issubclass(one.category, FutureWarning)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_said_about_what_is_allowed_or_deepspeeds_own(stage, workers):
    for records, futures in workers(2).run(said, stage):
        assert [text for text in records if "untested" in text] == ["ZeRO with an untested optimizer"]
        assert futures == []
