"""8-bit optimizers train as by hand, and a resumed run is the same run, to the last bit."""

import pytest
import torch
from bitsandbytes import optim
from torch import nn

from fabric_core import Fabric
from fabric_core.checkpoint.portable import portable_optimizer_state
from fabric_core.errors import CheckpointKeyError

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")

OPTIMIZERS = {
    "Adam8bit": {"lr": 1e-2},
    "AdamW8bit": {"lr": 1e-2, "weight_decay": 0.1},
    "Lion8bit": {"lr": 1e-3},
    "SGD8bit": {"lr": 0.1, "momentum": 0.9},
    "RMSprop8bit": {"lr": 1e-3},
    "AdEMAMix8bit": {"lr": 1e-2},
    "PagedAdamW8bit": {"lr": 1e-2},
}
BIG = 4096  # elements from which on bitsandbytes keeps a parameter's state in 8 bits


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def make(name, parameters):
    return getattr(optim, name)(parameters, **OPTIMIZERS[name])


def batch(step, rank=0, world_size=1):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
    return x.chunk(world_size)[rank]


def difference(model, x):
    return (model(x) - x.roll(1, 1)).square().mean()


def train(fabric, model, optimizer, steps, clip=0.05):
    """The loss of each step. Gradients are clipped, to less than half of what they are at first."""
    losses = []
    for step in steps:
        loss = difference(model, batch(step, fabric.global_rank, fabric.world_size))
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(fabric.all_reduce(loss.detach())))
    return losses


def started(name, order=list, **arguments):
    """Fabric, the model and the optimizer, over the model's parameters in the given order."""
    fabric = Fabric(**{"accelerator": "cpu", "devices": 1} | arguments)
    fabric.launch()
    module = network()
    return fabric, *fabric.setup(module, make(name, order(module.parameters())))


def states(optimizer, parameters):
    """The state of each parameter. Those of `optimizer.state` that are no tensor's are left out: there are none."""
    assert len(optimizer.state) == len(parameters)
    return [optimizer.state[parameter] for parameter in parameters]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_big_parameters_have_8_bit_state_and_small_ones_float32(name):
    fabric, model, optimizer = started(name)
    train(fabric, model, optimizer, range(1))
    for parameter in model.parameters():
        kind = torch.uint8 if parameter.numel() >= BIG else torch.float32
        state = optimizer.state[parameter]
        assert {state[key].dtype for key in ("state1", "state2") if key in state} == {kind}
    assert {parameter.numel() >= BIG for parameter in model.parameters()} == {True, False}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_what_a_loop_by_hand_does(name):
    fabric, model, optimizer = started(name)
    losses = train(fabric, model, optimizer, range(5))
    plain = network()
    its_optimizer = make(name, plain.parameters())
    for step, loss in enumerate(losses):
        own = difference(plain, batch(step))
        own.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        its_optimizer.step()
        its_optimizer.zero_grad()
        assert loss == own.item()
    assert same(list(model.parameters()), list(plain.parameters()))
    assert losses[-1] < losses[0]


def test_clipping_measures_the_norm_and_cuts_to_it():
    fabric, model, optimizer = started("AdamW8bit")
    fabric.backward(difference(model, batch(0)))
    before = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert before > 0.1
    assert torch.equal(fabric.clip_gradients(model, optimizer, max_norm=0.05), before)
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm() == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(name, precision, tmp_path):
    fabric, model, optimizer = started(name, precision=precision)
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    expected = states(optimizer, list(model.parameters()))
    expected = [{k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()} for state in expected]
    following = train(fabric, model, optimizer, range(3, 6))

    fabric, other, its_optimizer = started(name, precision=precision)
    assert not its_optimizer.state
    fabric.load(tmp_path / "x.ckpt", {"model": other, "optimizer": its_optimizer})
    assert same(states(its_optimizer, list(other.parameters())), expected)
    assert train(fabric, other, its_optimizer, range(3, 6)) == following
    assert same(states(its_optimizer, list(other.parameters())), states(optimizer, list(model.parameters())))


def test_state_of_another_training_is_replaced(tmp_path):
    fabric, model, optimizer = started("AdamW8bit")
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    following = train(fabric, model, optimizer, range(3, 5))
    train(fabric, model, optimizer, range(20, 25))
    optimizer.param_groups[0]["lr"] = 1.0
    fabric.load(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    assert train(fabric, model, optimizer, range(3, 5)) == following


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_by_name_goes_to_the_parameter_of_that_name(name, tmp_path):
    fabric, model, optimizer = started(name)
    train(fabric, model, optimizer, range(3))
    named = portable_optimizer_state(optimizer.optimizer, {"model": model})
    assert "0.weight" in named["state"]
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": named})

    def reverse(parameters):
        return list(parameters)[::-1]

    fabric, other, its_optimizer = started(name, order=reverse)
    fabric.load(tmp_path / "x.ckpt", {"model": other, "optimizer": its_optimizer})
    assert same(states(its_optimizer, list(other.parameters())), states(optimizer, list(model.parameters())))
    # Not clipped: the norm is a sum in the order of the parameters, and another order rounds otherwise.
    following = train(fabric, model, optimizer, range(3, 6), clip=1e9)
    assert train(fabric, other, its_optimizer, range(3, 6), clip=1e9) == following


def test_names_that_differ_are_listed_and_nothing_is_changed(tmp_path):
    fabric, model, optimizer = started("AdamW8bit")
    train(fabric, model, optimizer, range(2))
    named = portable_optimizer_state(optimizer.optimizer, {"model": model})
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": named})
    fabric, other, its_optimizer = started("AdamW8bit", order=lambda parameters: list(parameters)[:3])
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointKeyError, match=r"Unknown to the optimizer: 2\.bias"):
        fabric.load(tmp_path / "x.ckpt", {"model": other, "optimizer": its_optimizer})
    assert same(list(other.parameters()), before)
    assert not its_optimizer.state


def test_the_file_is_one_that_plain_torch_and_bitsandbytes_read(tmp_path):
    fabric, model, optimizer = started("AdamW8bit")
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    content = torch.load(tmp_path / "x.ckpt")
    plain = network()
    plain.load_state_dict(content["model"])
    its_optimizer = make("AdamW8bit", plain.parameters())
    its_optimizer.load_state_dict(content["optimizer"])
    assert same(states(its_optimizer, list(plain.parameters())), states(optimizer, list(model.parameters())))


def test_the_checkpoint_is_as_small_as_the_state(tmp_path):
    """Two moments of a byte each, and a map of 256 values, which all parameters share, is stored once."""
    fabric, model, optimizer = started("AdamW8bit")
    train(fabric, model, optimizer, range(1))
    fabric.save(tmp_path / "x.ckpt", {"optimizer": optimizer})
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "x.ckpt").stat().st_size < 2 * weights + 2 * 256 * 4 + 12_000  # and the file's own structure


def test_saving_in_the_background_keeps_the_state_of_that_moment(tmp_path):
    fabric, model, optimizer = started("AdamW8bit", checkpoint_io="async")
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    following = train(fabric, model, optimizer, range(3, 6))
    fabric.teardown()
    fabric, other, its_optimizer = started("AdamW8bit")
    fabric.load(tmp_path / "x.ckpt", {"model": other, "optimizer": its_optimizer})
    assert train(fabric, other, its_optimizer, range(3, 6)) == following


def on_two(name, path):
    """Losses of six steps on two processes, and of the last three once more, resumed from the third."""
    fabric, model, optimizer = started(name, devices=2, strategy="ddp")
    losses = train(fabric, model, optimizer, range(3))
    fabric.save(path, {"model": model, "optimizer": optimizer})
    losses += train(fabric, model, optimizer, range(3, 6))
    fabric, model, optimizer = started(name, devices=2, strategy="ddp")
    fabric.load(path, {"model": model, "optimizer": optimizer})
    again = train(fabric, model, optimizer, range(3, 6))
    state = states(optimizer, list(model.parameters()))
    return losses, again, sum(float(value.double().sum()) for entries in state for value in tensors(entries))


def tensors(state):
    return [value for value in state.values() if torch.is_tensor(value)]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit"])
def test_two_processes_train_and_resume_as_one(name, workers, tmp_path):
    (losses, again, state), second = workers(2).run(on_two, name, tmp_path / "x.ckpt")
    assert second == (losses, again, state)
    assert again == losses[3:]
    fabric, model, optimizer = started(name)
    # A gradient that differs by rounding may fall on the other side of one of the 256 values.
    assert train(fabric, model, optimizer, range(6)) == pytest.approx(losses, abs=1e-3)


def test_one_process_goes_on_from_the_checkpoint_of_two(workers, tmp_path):
    [(losses, _, _), _] = workers(2).run(on_two, "AdamW8bit", tmp_path / "x.ckpt")
    fabric, model, optimizer = started("AdamW8bit")
    fabric.load(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    assert optimizer.state[next(model.parameters())]["state1"].dtype == torch.uint8
    assert train(fabric, model, optimizer, range(3, 6)) == pytest.approx(losses[3:], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    fabric, model, optimizer = started(name, accelerator="cuda")
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    following = train(fabric, model, optimizer, range(3, 6))
    fabric, model, optimizer = started(name, accelerator="cuda")
    fabric.load(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    assert train(fabric, model, optimizer, range(3, 6)) == following
