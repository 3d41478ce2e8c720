"""Modules with saving and loading code of their own find their old values, and are given those of the checkpoint."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.errors import CheckpointError, CheckpointKeyError, InvalidTypeError


class Weight(nn.Parameter):
    """Not an ordinary parameter."""


class Scaled(nn.Module):
    """Small integers and a scale that is neither parameter nor buffer; takes weights in floating point as well."""

    def __init__(self, values):
        super().__init__()
        self.take(values)

    def take(self, values):
        self.scale = values.abs().max().reshape(1) / 127
        self.weight = Weight((values / self.scale).round().to(torch.int8), requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        values, scale = state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}scale")
        if scale is not None and float(scale) > 1000:
            errors.append("the scale is out of range")
        elif scale is None:
            self.take(values)
        else:
            self.weight.data, self.scale = values, scale


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def values(seed):
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))


def test_integers_are_not_written_over_by_floats_of_the_same_shape(fabric, tmp_path):
    fabric.save(tmp_path / "x.ckpt", {"model": {"0.weight": values(1)}})
    model = nn.Sequential(Scaled(values(2)))
    fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert torch.equal(model[0].weight, Scaled(values(1)).weight)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_what_is_not_below_the_loading_code_is_checked_before_anything_is_written(fabric, tmp_path, wrong):
    state = nn.Sequential(Scaled(values(1)), nn.Linear(2, 2)).state_dict()
    if wrong == "missing":
        del state["1.bias"]
    else:
        state["1.bias" if wrong == "shape" else "2.bias"] = torch.ones(3)
    fabric.save(tmp_path / "x.ckpt", {"model": state})
    model = fabric.setup(nn.Sequential(Scaled(values(2)), nn.Linear(2, 2)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = CheckpointError if wrong == "shape" else CheckpointKeyError
    with pytest.raises(expected, match=rf"Nothing was loaded\. .*{'2' if wrong == 'unknown' else '1'}\.bias") as caught:
        fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert type(caught.value) is expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_state_outside_of_parameters_comes_back(fabric, tmp_path):
    fabric.save(tmp_path / "x.ckpt", {"model": nn.Sequential(Scaled(values(1)))})
    model = nn.Sequential(Scaled(values(2)))
    fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert torch.equal(model[0].weight, Scaled(values(1)).weight)
    assert torch.equal(model[0].scale, Scaled(values(1)).scale)


def test_what_the_loading_code_refuses_is_not_written(fabric, tmp_path):
    refused = {**nn.Sequential(Scaled(values(1))).state_dict(), "0.scale": torch.tensor([2000.0])}
    fabric.save(tmp_path / "x.ckpt", {"model": refused})
    model = nn.Sequential(Scaled(values(2)))
    with pytest.raises(RuntimeError, match="out of range"):
        fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert torch.equal(model[0].weight, Scaled(values(2)).weight)
    assert torch.equal(model[0].scale, Scaled(values(2)).scale)


class Careful(Scaled):
    """Says beforehand what it would refuse."""

    def state_dict_problems(self, state_dict, prefix, strict):
        there = f"{prefix}weight" in state_dict
        return [] if there or not strict else [f"{prefix}weight is not there."]


class Renaming(nn.Module):
    """What is below it sees other keys than those that are stored."""

    def __init__(self, below):
        super().__init__()
        self.below = below

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict({key.replace("old", "below"): v for key, v in state_dict.items()}, *args)


def test_loading_code_can_refuse_before_anything_is_written(fabric, tmp_path):
    fabric.save(
        tmp_path / "x.ckpt", {"model": {"0.scale": torch.ones(1), "1.weight": values(1), "1.bias": torch.ones(8)}}
    )
    model = nn.Sequential(Careful(values(2)), nn.Linear(8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"Sequential\. Nothing was loaded\. 0\.weight is not there\.$"):
        fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_answer_that_is_no_list_is_a_mistake(fabric, tmp_path, monkeypatch):
    monkeypatch.setattr(Careful, "state_dict_problems", lambda *_: "no")
    fabric.save(tmp_path / "x.ckpt", {"model": {"0.weight": values(1)}})
    with pytest.raises(InvalidTypeError, match=r"Careful\.state_dict_problems\(\) answered 'no'"):
        fabric.load(tmp_path / "x.ckpt", {"model": nn.Sequential(Careful(values(2)))})


def test_it_is_told_if_names_may_differ(fabric, tmp_path):
    fabric.save(tmp_path / "x.ckpt", {"model": {"1.weight": values(1), "1.bias": torch.ones(8)}})
    model = nn.Sequential(Careful(values(2)), nn.Linear(8, 8))
    with pytest.raises(KeyError):  # its own code, which does not care for that
        fabric.load(tmp_path / "x.ckpt", {"model": model}, strict=False)


def test_it_is_not_asked_about_keys_that_other_code_may_rename(fabric, tmp_path):
    fabric.save(tmp_path / "x.ckpt", {"model": {"old.weight": values(1)}})
    model = Renaming(Careful(values(2)))
    fabric.load(tmp_path / "x.ckpt", {"model": model})
    assert torch.equal(model.below.weight, Careful(values(1)).weight)
