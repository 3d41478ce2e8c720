"""Adapters beside frozen quantised layers: they learn, and what is below them stays as it is, bit for bit."""

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.nn import functional

from fabric_bnb import BitsandbytesPrecision, QuantizedLinear4bit
from fabric_core import Fabric

DTYPES = dict.fromkeys(["nf4", "nf4-dq", "fp4", "fp4-dq"], torch.uint8)
DTYPES |= {"int8": torch.int8, "int8-training": torch.float16}
MODES = list(DTYPES)
FEATURES, RANK = 128, 32  # RANK x FEATURES is 4096: large enough for 8-bit optimizer state


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter of bare parameters beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x):
        y = self.base(x)
        return y + functional.linear(functional.linear(x.to(self.down.dtype), self.down), self.up).to(y.dtype)


def network():
    torch.manual_seed(0)
    layers = nn.Linear(FEATURES, 2 * FEATURES), nn.Tanh(), nn.Linear(2 * FEATURES, FEATURES)
    return nn.Sequential(*(Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in layers))


def adapters(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def started(mode, **arguments):
    fabric = Fabric(**{"accelerator": "cpu", "devices": 1, "precision": f"bnb-{mode}"} | arguments)
    fabric.launch()
    module = network()
    return fabric, *fabric.setup(module, AdamW8bit(adapters(module), lr=1e-2))


def batch(step=0):
    return torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(step))


def train(fabric, model, optimizer, steps):
    losses = []
    for step in steps:
        x = batch(step).chunk(fabric.world_size)[fabric.global_rank]
        loss = (model(x) - 0.2 * x.roll(1, 1)).float().square().mean()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(fabric.all_reduce(loss.detach())))
    return losses


def base_state(model):
    """Everything of the frozen layers: codes, scales, tables, biases."""
    return {key: value.clone() for key, value in model.state_dict().items() if ".base." in key}


def of_adapter(key, value):
    return ".base." not in key


@pytest.mark.parametrize("mode", MODES)
def test_training_lowers_the_loss_and_leaves_the_base_alone(mode):
    fabric, model, optimizer = started(mode)
    before = base_state(model)
    losses = train(fabric, model, optimizer, range(30))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    after = base_state(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("mode", MODES)
def test_only_the_layers_are_quantised_and_only_the_adapters_train(mode):
    fabric, model, optimizer = started(mode)
    train(fabric, model, optimizer, range(1))
    for layer in (model.module[0], model.module[2]):
        assert layer.base.weight.dtype == DTYPES[mode]
        assert layer.base.weight.grad is None
        assert layer.down.dtype == layer.up.dtype == torch.float32
        assert optimizer.state[layer.down]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("mode", MODES)
def test_evaluating_in_between_changes_nothing(mode):
    fabric, model, optimizer = started(mode)
    before, losses = base_state(model), train(fabric, model, optimizer, range(2))
    with torch.no_grad():
        model.eval()(batch())
    losses += train(fabric, model.train(), optimizer, range(2, 4))
    assert all(torch.equal(value, base_state(model)[key]) for key, value in before.items())
    fabric, other, its_optimizer = started(mode)
    assert train(fabric, other, its_optimizer, range(4)) == losses


@pytest.mark.parametrize("mode", MODES)
def test_adapters_alone_are_a_small_file_that_fits_a_new_base(mode, tmp_path):
    fabric, model, optimizer = started(mode)
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "adapters.ckpt", {"model": model}, filter={"model": of_adapter})
    assert set(torch.load(tmp_path / "adapters.ckpt")["model"]) == {"0.down", "0.up", "2.down", "2.up"}

    fabric, other, _ = started(mode)
    with torch.no_grad():
        expected, untrained = model.eval()(batch()), other.eval()(batch())
        fabric.load(tmp_path / "adapters.ckpt", {"model": other}, strict=False)
        assert torch.equal(other(batch()), expected)
    assert not torch.equal(untrained, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one(mode, tmp_path):
    fabric, model, optimizer = started(mode)
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    following = train(fabric, model, optimizer, range(3, 6))
    fabric, other, its_optimizer = started(mode)
    for parameter in other.parameters():
        parameter.data.zero_()  # all comes from the file
    fabric.load(tmp_path / "x.ckpt", {"model": other, "optimizer": its_optimizer})
    assert train(fabric, other, its_optimizer, range(3, 6)) == following


def on_two(mode, path):
    fabric, model, optimizer = started(mode, devices=2, strategy="ddp")
    losses = train(fabric, model, optimizer, range(4))
    fabric.save(path, {"model": model}, filter={"model": of_adapter})
    return losses, [parameter.detach().numpy().tobytes() for parameter in adapters(model)]


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_two_processes_train_as_one(mode, workers, tmp_path):
    first, second = workers(2).run(on_two, mode, tmp_path / "adapters.ckpt")
    assert first == second
    fabric, model, optimizer = started(mode)
    assert train(fabric, model, optimizer, range(4)) == pytest.approx(first[0], rel=2e-2)
    fabric.load(tmp_path / "adapters.ckpt", {"model": model}, strict=False)
    assert [parameter.detach().numpy().tobytes() for parameter in adapters(model)] == first[1]


class WithLinear(nn.Module):
    """An adapter made of linear layers, as other packages make them."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_b = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x))


def test_adapters_made_of_linear_layers_stay_if_they_are_named():
    model = nn.Sequential(WithLinear(nn.Linear(FEATURES, FEATURES)))
    names = {name for name, _ in model.named_modules() if "lora_" in name}
    fabric = Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision("nf4", ignore_modules=names))
    model, optimizer = fabric.setup(model, AdamW8bit(adapters(model), lr=1e-2))
    check_that_only_the_base_is_quantised(fabric, model, optimizer)


def test_adapters_put_beside_layers_that_are_quantised_already_stay():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bnb-nf4")
    with fabric.init_module():
        base = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    model = nn.Sequential(WithLinear(base[0]))
    model, optimizer = fabric.setup(model, AdamW8bit(adapters(model), lr=1e-2))
    check_that_only_the_base_is_quantised(fabric, model, optimizer)


def check_that_only_the_base_is_quantised(fabric, model, optimizer):
    layer = model.module[0]
    assert isinstance(layer.base, QuantizedLinear4bit)
    assert layer.base.is_quantized
    assert type(layer.lora_a) is type(layer.lora_b) is nn.Linear
    losses = train(fabric, model, optimizer, range(30))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def base_per_rank():
    """Every rank builds another base; what its layers and its model compute after set-up."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="bnb-nf4-dq")
    fabric.launch()
    torch.manual_seed(fabric.global_rank)
    model = fabric.setup(nn.Sequential(Adapted(nn.Linear(FEATURES, FEATURES))))
    with torch.no_grad():
        return model.module[0].base.dequantize().numpy().tobytes(), model(batch()).numpy().tobytes()


def test_all_ranks_have_the_base_of_rank_0(workers):
    first, second = workers(2).run(base_per_rank)
    assert first == second


def test_float16_weights_multiplied_in_8_bits_learn_with_an_8_bit_optimizer():
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bnb-int8-training")
    module = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
    model, optimizer = fabric.setup(module, AdamW8bit(module.parameters(), lr=1e-2))
    losses = train(fabric, model, optimizer, range(30))
    assert {layer.weight.dtype for layer in (model.module[0], model.module[2])} == {torch.float16}
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
