"""What ``load`` puts back: into the very objects that were passed, and nothing that the checkpoint does not hold."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fabric_core import Fabric


@dataclass
class Progress:
    step: int = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state_dict):
        self.step = state_dict["step"]


class Counts(dict):
    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state_dict):
        self.update(state_dict)


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.mark.parametrize(("saved", "fresh"), [(Progress(7), Progress()), (Counts(a=1), Counts(a=0))])
def test_a_stateful_object_of_the_users_own_is_restored_in_place(fabric, tmp_path, saved, fresh):
    fabric.save(tmp_path / "x.ckpt", {"own": saved})
    state = {"own": fresh}
    fabric.load(tmp_path / "x.ckpt", state)
    assert state["own"] is fresh
    assert fresh == saved


def test_what_the_checkpoint_lacks_stays_the_same_object(fabric, tmp_path):
    fabric.save(tmp_path / "x.ckpt", {"step": 3})
    history = [1, 2]
    state = {"step": 0, "history": history}
    fabric.load(tmp_path / "x.ckpt", state, strict=False)
    assert state == {"step": 3, "history": [1, 2]}
    assert state["history"] is history


def test_a_wrapped_module_stays_wrapped_in_the_state(fabric, tmp_path):
    model = fabric.setup(nn.Linear(2, 1))
    fabric.save(tmp_path / "x.ckpt", {"model": model})
    expected = model.weight.clone()
    with torch.no_grad():
        model.weight.zero_()
    state = {"model": model}
    fabric.load(tmp_path / "x.ckpt", state)
    assert state["model"] is model
    assert torch.equal(model.weight, expected)
