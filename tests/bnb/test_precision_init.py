"""``fabric.init_module()``: ``torch.nn.Linear`` makes quantised layers there, and is itself again afterwards."""

import importlib
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import Linear

from fabric_bnb import BitsandbytesPrecision, QuantizedLinear4bit, QuantizedLinear8bit, TrainableLinear8bit
from fabric_bnb.replacing import LinearReplaced
from fabric_core import Fabric
from fabric_core.errors import UsageError

FROZEN = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
MODES = [*FROZEN, "int8-training"]
LAYERS = dict.fromkeys(MODES, QuantizedLinear4bit) | {"int8": QuantizedLinear8bit, "int8-training": TrainableLinear8bit}
ORIGINAL = nn.Linear


def fabric_of(mode):
    return Fabric(accelerator="cpu", devices=1, precision=f"bnb-{mode}")


def nowhere_replaced():
    return all(holder.Linear is ORIGINAL for holder in (nn, nn.modules, nn.modules.linear, sys.modules[__name__]))


@pytest.mark.parametrize("mode", MODES)
def test_linear_layers_are_built_quantized_however_the_class_is_reached(mode):
    with fabric_of(mode).init_module():
        layers = [
            nn.Linear(8, 4),
            torch.nn.Linear(8, out_features=4, bias=False),
            Linear(in_features=8, out_features=4),
            nn.modules.linear.Linear(8, 4),
            nn.TransformerEncoderLayer(8, 2, 16).linear1,
        ]
    assert {type(layer) for layer in layers} == {LAYERS[mode]}
    assert layers[1].bias is None
    assert nowhere_replaced()


@pytest.mark.parametrize("mode", MODES)
def test_it_is_over_even_if_the_block_fails(mode):
    with pytest.raises(ZeroDivisionError), fabric_of(mode).init_module():
        raise ZeroDivisionError
    assert nowhere_replaced()
    assert torch.get_default_dtype() is torch.float32
    assert type(nn.Linear(2, 2)) is ORIGINAL


def test_blocks_may_be_nested_and_the_innermost_counts():
    outer, inner = fabric_of("nf4"), fabric_of("int8")
    with outer.init_module():
        first = nn.Linear(4, 4)
        with inner.init_module():
            second = nn.Linear(4, 4)
            with pytest.raises(ZeroDivisionError), inner.init_module():
                raise ZeroDivisionError
            third = nn.Linear(4, 4)
        fourth = nn.Linear(4, 4)
    assert [type(layer) for layer in (first, second, third, fourth)] == [
        QuantizedLinear4bit,
        QuantizedLinear8bit,
        QuantizedLinear8bit,
        QuantizedLinear4bit,
    ]
    assert nowhere_replaced()


def test_one_block_may_be_entered_inside_itself():
    block = LinearReplaced(lambda *sizes: nn.Identity())
    with block, block:
        assert type(nn.Linear(2, 2)) is nn.Identity
    assert nowhere_replaced()


class LowRank(nn.Linear):
    """Calls its base by name, as published adapters do."""

    def __init__(self, inputs, outputs):
        nn.Linear.__init__(self, inputs, outputs)
        self.down = nn.Parameter(torch.zeros(1, inputs))

    def forward(self, x):
        return nn.Linear.forward(self, x)


def test_the_class_means_what_it_always_means_apart_from_calling_it():
    plain = nn.Linear(2, 2)
    with fabric_of("nf4").init_module():
        assert isinstance(plain, nn.Linear)
        assert isinstance(nn.Linear(2, 2), nn.Linear)
        assert not isinstance(nn.Identity(), nn.Linear)
        assert issubclass(LowRank, nn.Linear)
        assert not issubclass(nn.Identity, nn.Linear)
        made = LowRank(4, 2)

        class Inside(nn.Linear):
            pass

        own = Inside(4, 2)
    assert type(made) is LowRank
    assert type(own) is Inside
    assert isinstance(own, nn.Linear)
    assert own(torch.ones(1, 4, dtype=torch.bfloat16)).shape == (1, 2)


def test_modules_that_are_unpickled_inside_are_torchs_own():
    pickled = pickle.dumps(nn.Sequential(nn.Linear(4, 2)))
    with fabric_of("nf4").init_module():
        net = pickle.loads(pickled)
    assert type(net[0]) is ORIGINAL
    assert pickle.dumps(net)


def test_modules_that_are_imported_inside_hold_the_class_afterwards(tmp_path, monkeypatch):
    tmp_path.joinpath("late_bnb_import.py").write_text(
        "from torch.nn import Linear\nfrom torch.nn import Linear as Dense\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with fabric_of("nf4").init_module():
        late = importlib.import_module("late_bnb_import")
        assert type(late.Linear(2, 2)) is QuantizedLinear4bit
    assert late.Linear is ORIGINAL
    assert type(late.Dense(2, 2)) is ORIGINAL
    assert isinstance(nn.Linear(2, 2), late.Dense)
    del sys.modules["late_bnb_import"]


def test_other_parameters_have_the_compute_dtype():
    with fabric_of("nf4").init_module():
        net = nn.ModuleList([nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 8, dtype=torch.float32)])
    assert net[0].bias.dtype is net[0].weight.dtype is net[1].weight.dtype is torch.bfloat16
    assert net[2].bias.dtype is torch.float32


@pytest.mark.parametrize(("mode", "dtype"), [("nf4", torch.bfloat16), ("int8", torch.float16)])
def test_tensors_have_the_compute_dtype(mode, dtype):
    with fabric_of(mode).init_tensor():
        assert torch.ones(1).dtype is dtype
    assert torch.ones(1).dtype is torch.float32


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.apply(self.init)

    @staticmethod
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)
            nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_models_own_initialisation_counts(mode):
    fabric = fabric_of(mode)
    with fabric.init_module():
        custom = Custom()
    y = fabric.setup(custom)(torch.ones(1, 64))
    torch.testing.assert_close(y, torch.full((1, 32), 32.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("mode", FROZEN)
def test_setup_quantizes_what_was_drawn(mode):
    fabric = fabric_of(mode)
    torch.manual_seed(0)
    with fabric.init_module():
        built = nn.Sequential(nn.Linear(64, 32))
    assert not built[0].is_quantized
    drawn = built[0].weight.detach().float()
    fabric.setup(built)
    assert built[0].is_quantized
    error = built[0].dequantize().float() - drawn
    assert error.norm() / drawn.norm() < (0.15 if "4" in mode else 0.02)


@pytest.mark.parametrize("mode", FROZEN)
def test_empty_layers_have_their_small_memory_at_once_and_wait_for_a_checkpoint(mode):
    fabric = fabric_of(mode)
    with fabric.init_module(empty_init=True):
        net = Custom()
    assert net.linear.is_quantized
    assert net.linear.weight.nbytes == 64 * 32 * (0.5 if "4" in mode else 1)
    model = fabric.setup(net)
    nn.init.zeros_(net.linear.bias)
    assert model(torch.ones(1, 64)).isnan().all()
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    model.load_state_dict({f"linear.{key}": value for key, value in plain.state_dict().items()})
    x = torch.randn(8, 64)
    assert (model(x) - plain(x)).detach().norm() / plain(x).detach().norm() < 0.2


@pytest.mark.parametrize("mode", FROZEN)
def test_layers_on_the_meta_device_take_a_checkpoint_and_are_set_up(mode):
    fabric = fabric_of(mode)
    with fabric.init_module(), torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 32))
    assert net[0].weight.is_meta
    plain = nn.Sequential(nn.Linear(64, 32))
    net.load_state_dict(plain.state_dict())
    model = fabric.setup(net)
    x = torch.randn(8, 64)
    assert (model(x) - plain(x)).detach().norm() / plain(x).detach().norm() < 0.2


def test_weights_cannot_be_borrowed_from_a_layer_without_a_full_one():
    fabric = fabric_of("nf4")
    with fabric.init_module(empty_init=True):
        net = nn.ModuleDict({"table": nn.Embedding(32, 64), "head": nn.Linear(64, 32)})
        net["table"].weight = net["head"].weight
    with pytest.raises(UsageError, match=r"table\.weight: shared with a linear layer .*linear\.weight = other\.weight"):
        fabric.setup(net)


def test_names_cannot_be_ignored_before_there_are_any():
    precision = BitsandbytesPrecision("nf4", ignore_modules={"head"})
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[precision])
    with pytest.raises(RuntimeError, match=r"cannot know which will be named head\. Build the module outside"):
        fabric.init_module().__enter__()
    assert nowhere_replaced()
