"""``loss.backward()`` where only ``fabric.backward(loss)`` does the whole work."""

import threading

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.plugins import MixedPrecision
from fabric_core.strategies import SingleDeviceStrategy


def scaled():
    return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", device="cpu"))


class OwnBackward(SingleDeviceStrategy):
    def backward(self, tensor, module, *args, **kwargs):
        super().backward(tensor, module, *args, **kwargs)


GUARDED = {
    "a scaler": scaled,
    "a precision with hooks": lambda: Fabric(accelerator="cpu", devices=1, precision="fake"),
    "a strategy's own backward": lambda: Fabric(accelerator="cpu", devices=1, strategy=OwnBackward()),
}


@pytest.mark.parametrize("make", GUARDED.values(), ids=GUARDED)
def test_a_plain_backward_is_refused(make, fake_backend):
    model = make().setup(nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match=r"Call fabric\.backward\(loss\) instead"):
        model(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize("make", GUARDED.values(), ids=GUARDED)
def test_fabrics_backward_is_welcome(make, fake_backend):
    fabric = make()
    model = fabric.setup(nn.Linear(2, 1))
    fabric.backward(model(torch.ones(1, 2)).sum())
    assert model.weight.grad is not None


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_a_plain_backward_is_fine_where_it_does_the_whole_work(precision):
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


class Outputs(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return {"text": "kept", "list": [out, out.detach()]}


def test_every_output_in_a_collection_is_guarded():
    model = scaled().setup(Outputs(2, 1))
    output = model(torch.ones(1, 2))
    assert output["text"] == "kept"
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        output["list"][0].sum().backward()


def test_a_marked_method_is_guarded_too():
    class Stepping(nn.Linear):
        def training_step(self, x):
            return self(x).sum()

    model = scaled().setup(Stepping(2, 1))
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        model.training_step(torch.ones(1, 2)).backward()


def test_outputs_without_gradients_need_no_guard():
    model = scaled().setup(nn.Linear(2, 1))
    with torch.no_grad():
        assert model(torch.ones(1, 2)).requires_grad is False


def test_the_guard_is_back_after_fabrics_backward_failed():
    fabric = scaled()
    model = fabric.setup(nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match="scalar"):
        fabric.backward(model(torch.ones(2, 2)))
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        model(torch.ones(1, 2)).sum().backward()


def test_fabrics_backward_is_welcome_in_other_threads():
    fabric, errors = scaled(), []
    model = fabric.setup(nn.Linear(2, 1))

    def train():
        try:
            fabric.backward(model(torch.ones(1, 2)).sum())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
