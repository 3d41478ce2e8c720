"""What ``Fabric(precision="bnb-...")`` does with a module at set-up, and what it refuses."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from fabric_bnb import BitsandbytesPrecision, QuantizedLinear4bit, QuantizedLinear8bit, TrainableLinear8bit
from fabric_core import Fabric
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UsageError
from fabric_core.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from fabric_core.testing.fake import FakeAccelerator
from fabric_core.warnings import PossibleUserWarning

MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"]
LAYERS = dict.fromkeys(MODES, QuantizedLinear4bit) | {"int8": QuantizedLinear8bit, "int8-training": TrainableLinear8bit}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 8)
        self.head2 = nn.Linear(64, 8)

    def forward(self, x):
        hidden = self.norm(self.inner(x).tanh())
        return self.head(hidden) + self.head2(hidden)


def fabric_of(precision, **arguments):
    return Fabric(**{"accelerator": "cpu", "devices": 1, "precision": precision, **arguments})


def given(precision, **arguments):
    return Fabric(accelerator="cpu", devices=1, plugins=[precision], **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", ["", "bnb-"])
def test_each_mode_has_its_names(mode, prefix):
    fabric = fabric_of(prefix + mode)
    assert fabric.strategy.precision.mode.name == mode
    assert fabric.strategy.precision.precision == f"bnb-{mode}"
    assert type(fabric.setup(nn.Linear(64, 8)).module) is LAYERS[mode]


@pytest.mark.parametrize("mode", MODES)
def test_linear_layers_are_quantized_and_all_else_is_as_it_was(mode):
    block = Block()
    bias, norm = block.inner.bias, block.norm
    model = fabric_of(f"bnb-{mode}").setup(block)
    assert model.module is block
    assert {type(part) for part in (block.inner, block.head, block.head2)} == {LAYERS[mode]}
    assert block.inner.bias is bias
    assert block.norm is norm
    assert norm.weight.dtype is torch.float32
    assert block.inner.weight.requires_grad == (mode == "int8-training")
    assert all(parameter.requires_grad for parameter in (bias, norm.weight))


@pytest.mark.parametrize("mode", MODES[:-1])
def test_weights_are_quantized_by_setup_but_not_without_a_move(mode):
    assert fabric_of(f"bnb-{mode}").setup(Block()).inner.is_quantized
    assert not fabric_of(f"bnb-{mode}").setup(Block(), move_to_device=False).inner.is_quantized


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_close_to_single_precision_in_the_default_dtype(mode):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    y, expected = fabric_of(f"bnb-{mode}").setup(Block())(x), Block()(x)
    assert y.dtype is torch.float32
    bound = 0.02 if "int8" in mode else 0.25
    assert (y - expected).detach().norm() / expected.detach().norm() < bound


class Spy(nn.Module):
    """Notes the dtypes of what it is given and of what is made meanwhile."""

    def __init__(self, **arguments):
        super().__init__()
        self.linear = nn.Linear(64, 8, **arguments)

    def forward(self, x, *, scale):
        self.seen = x.dtype, scale.dtype, torch.zeros(1).dtype
        return {"y": self.linear(x), "n": torch.ones(1, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bnb-nf4", torch.bfloat16), ("bnb-fp4-dq", torch.bfloat16), ("bnb-int8", torch.float16)]
    + [("bnb-int8-training", torch.float16)],
)
def test_inputs_are_converted_and_outputs_converted_back(precision, dtype):
    fabric = fabric_of(precision)
    model = fabric.setup(Spy())
    out = model(torch.randn(2, 64), scale=torch.ones(1, dtype=torch.float64))
    assert fabric.strategy.precision.compute_dtype is dtype
    assert model.seen == (dtype, dtype, dtype)
    assert (out["y"].dtype, out["n"].dtype) == (torch.float32, torch.int64)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_four_bits_compute_in_the_dtype_that_is_passed(dtype):
    precision = BitsandbytesPrecision("nf4", dtype=dtype)
    model = given(precision).setup(Spy())
    model(torch.randn(2, 64), scale=torch.ones(1))
    assert precision.dtype is precision.compute_dtype is dtype
    assert model.linear.compute_dtype is dtype
    assert model.seen[0] is dtype


def test_a_name_to_ignore_ends_at_a_dot_or_at_its_end():
    block = nn.ModuleDict({"a": Block(), "head": Block()})
    given(BitsandbytesPrecision("nf4", ignore_modules=["head", "a.head"])).setup(block)
    plain = [name for name, part in block.named_modules() if type(part) is nn.Linear]
    assert plain == ["a.head", "head.inner", "head.head", "head.head2"]


def test_a_name_to_ignore_that_means_nothing_is_reported():
    with pytest.warns(PossibleUserWarning, match=r"ignore_modules names 'haed'.*It has inner, norm, head, head2"):
        given(BitsandbytesPrecision("nf4", ignore_modules={"haed"})).setup(Block())


@pytest.mark.parametrize("ignored", ["head", [1], [""], 5, 0])
def test_names_to_ignore_are_a_collection_of_names(ignored):
    with pytest.raises(InvalidTypeError, match="ignore_modules"):
        BitsandbytesPrecision("nf4", ignore_modules=ignored)


def test_a_module_without_linear_layers_is_refused():
    with pytest.raises(TypeError, match=r"quantises torch\.nn\.Linear layers, and Conv2d has none\. Use another"):
        fabric_of("bnb-nf4").setup(nn.Conv2d(1, 1, 1))


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_subclasses_of_linear_keep_their_code():
    net = nn.Sequential(nn.Linear(64, 64), OwnLinear(64, 64), nn.MultiheadAttention(64, 4))
    fabric_of("bnb-nf4").setup(net)
    assert type(net[0]) is QuantizedLinear4bit
    assert type(net[1]) is OwnLinear
    assert type(net[2].out_proj) is not QuantizedLinear4bit


def test_a_module_whose_linear_layers_are_all_special_is_refused():
    with pytest.raises(TypeError, match=r"has none to quantise: the module itself is ignored, of a subclass"):
        fabric_of("bnb-nf4").setup(OwnLinear(64, 64))


def test_a_layer_to_which_something_was_added_is_left_alone():
    net = nn.Sequential(nn.Linear(64, 64), nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    fabric_of("bnb-nf4").setup(net)
    assert type(net[0]) is QuantizedLinear4bit
    assert not isinstance(net[1], QuantizedLinear4bit)


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 64)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32, bias=False)
        if tie == "head to table":
            self.head.weight = self.table.weight
        else:
            self.table.weight = self.head.weight

    def forward(self, tokens):
        return self.head(self.inner(self.table(tokens)))


@pytest.mark.parametrize("built", ["before", "inside"])
@pytest.mark.parametrize("tie", ["head to table", "table to head"])
def test_a_weight_that_is_shared_stays_shared_and_unquantized(built, tie):
    fabric = fabric_of("bnb-nf4")
    if built == "inside":
        with fabric.init_module():
            tied = Tied(tie)
    else:
        tied = Tied(tie)
    model = fabric.setup(tied)
    assert tied.head.weight is tied.table.weight
    assert tied.head.weight.is_floating_point()
    assert tied.inner.is_quantized
    model(torch.arange(4)).sum().backward()


def test_one_layer_in_two_places_stays_one():
    layer = nn.Linear(64, 64)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    fabric_of("bnb-nf4").setup(net)
    assert net[0] is net[2]
    assert type(net[0]) is QuantizedLinear4bit


def test_what_is_built_of_quantized_layers_keeps_its_other_linear_layers():
    net = nn.Sequential(QuantizedLinear4bit(64, 64), nn.Linear(64, 64))
    fabric_of("bnb-nf4").setup(net)
    assert net[0].is_quantized
    assert net[0].compute_dtype is torch.bfloat16
    assert type(net[1]) is nn.Linear


def test_layers_of_another_mode_stay_in_it_and_are_named():
    net = nn.Sequential(QuantizedLinear4bit(64, 64), QuantizedLinear4bit(64, 64, quant_type="fp4"))
    with pytest.warns(PossibleUserWarning, match=r"1 layers were .*'bnb-nf4' says: 1 \(fp4\)\. For this"):
        fabric_of("bnb-nf4").setup(net)
    assert net[1].mode == "fp4"


def test_bitsandbytes_own_layers_are_used_as_they_are():
    net = nn.Sequential(Linear4bit(64, 64, quant_type="nf4"))
    model = fabric_of("bnb-nf4").setup(net)
    assert type(net[0]) is Linear4bit
    assert net[0].compute_dtype is torch.bfloat16
    assert net[0].weight.dtype is torch.uint8
    assert model.train()(torch.randn(2, 64)).isfinite().all()


def test_setting_up_a_second_time_changes_nothing():
    block = Block()
    fabric_of("bnb-nf4").setup(block)
    before = block.state_dict()
    hooks = len(block.norm._forward_pre_hooks)
    fabric_of("bnb-nf4").setup(block)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert len(block.norm._forward_pre_hooks) == hooks == 1


def test_the_weights_of_linear_layers_are_let_go_of():
    block = Block()
    weight = weakref.ref(block.inner.weight)
    fabric_of("bnb-nf4").setup(block)
    gc.collect()
    assert weight() is None


def test_an_optimizer_over_replaced_weights_is_reported():
    block = Block()
    with pytest.warns(PossibleUserWarning, match="3 parameters of the optimizer are weights that precision='bnb-nf4'"):
        fabric_of("bnb-nf4").setup(block, torch.optim.SGD(block.parameters(), lr=0.1))


def test_an_optimizer_over_what_stays_is_fine():
    block = Block()
    rest = [parameter for name, parameter in block.named_parameters() if "norm" in name or "bias" in name]
    model, optimizer = fabric_of("bnb-nf4").setup(block, torch.optim.SGD(rest, lr=0.1))
    before = block.head.bias.clone()
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(block.head.bias, before)


def test_weights_that_are_trained_in_8_bits_stay_with_their_optimizer():
    block = Block()
    fabric = fabric_of("bnb-int8-training")
    model, optimizer = fabric.setup(block, torch.optim.SGD(block.parameters(), lr=0.05))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        loss = (model(x) - x[:, :8]).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert block.inner.weight.dtype is torch.float16
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mode", ["nf5", "bnb-nf4", None, 4])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match="expected one of 'nf4', 'nf4-dq', 'fp4', 'fp4-dq', 'int8', 'int8-training'"):
        BitsandbytesPrecision(mode)


@pytest.mark.parametrize("mode", ["int8", "int8-training"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eight_bits_compute_in_float16_only(mode, dtype):
    with pytest.raises(ValueError, match=r"torch\.float16 only"):
        BitsandbytesPrecision(mode, dtype=dtype)
    assert BitsandbytesPrecision(mode, dtype=torch.float16).dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_four_bits_do_not_compute_in_any_dtype(dtype):
    with pytest.raises(InvalidArgumentError, match=r"expected torch\.bfloat16"):
        BitsandbytesPrecision("nf4", dtype=dtype)


def test_a_precision_can_be_sent_to_another_process():
    precision = pickle.loads(pickle.dumps(BitsandbytesPrecision("nf4", ignore_modules={"head"})))
    assert precision.mode.name == "nf4"
    assert precision.ignore_modules == {"head"}


@pytest.mark.parametrize("copy_of", [lambda obj: pickle.loads(pickle.dumps(obj)), copy.deepcopy])
def test_a_model_can_be_sent_after_its_weights_were_replaced(copy_of):
    model = fabric_of("bnb-nf4").setup(Block())
    x = torch.randn(2, 64)
    assert torch.equal(copy_of(model)(x), model(x))


def test_a_precision_object_is_no_name():
    with pytest.raises(InvalidTypeError, match=r"an object, a BitsandbytesPrecision: pass it as plugins=\[\.\.\.\]"):
        fabric_of(BitsandbytesPrecision("nf4"))


def test_an_accelerator_that_cannot_do_it_is_refused(fake_backend, monkeypatch):
    monkeypatch.setattr(FakeAccelerator, "device_type", classmethod(lambda cls: "mps"))
    with pytest.raises(UsageError, match=r"precision='bnb-nf4' .* does not run on .*It runs on: cpu, cuda, hpu, xpu"):
        Fabric(accelerator="fake", devices=1, precision="bnb-nf4")


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy(lambda module, mesh: module)])
def test_strategies_that_split_parameters_are_refused(strategy):
    with pytest.raises(InvalidArgumentError, match=r"which splits parameters.*Use strategy=\"ddp\" or a single device"):
        given(BitsandbytesPrecision("nf4"), strategy=strategy)


class Joint(SingleDeviceStrategy):
    setup_mode = "joint"


def test_strategies_that_bring_an_engine_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"strategy=.*whose engine casts and moves parameters by itself"):
        fabric_of("bnb-nf4", strategy=Joint())


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_the_names_do_not_exist_where_they_cannot_be_used(strategy):
    with pytest.raises(
        InvalidArgumentError,
        match=r"'bnb-nf4' \(fabric-bnb .*\) does not go with fsdp strategies, which take '32-true'",
    ):
        fabric_of("bnb-nf4", strategy=strategy)


def test_other_precisions_are_not_this_packages_business():
    assert fabric_of("bf16-true", strategy=Joint()).setup(Block()) is not None


def test_no_more_than_one_weight_is_there_in_full_and_in_few_bits(monkeypatch):
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    full = [weakref.ref(layer.weight.untyped_storage()) for layer in net]
    alive, pack = [], QuantizedLinear4bit.pack

    def noting(layer, weight):
        gc.collect()
        alive.append(sum(storage() is not None for storage in full))
        pack(layer, weight)

    monkeypatch.setattr(QuantizedLinear4bit, "pack", noting)
    fabric_of("bnb-nf4").setup(net)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_was_set_up_can_be_pickled_and_copied(mode):
    model = fabric_of(f"bnb-{mode}").setup(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    x = torch.randn(2, 64)
    for twin in (pickle.loads(pickle.dumps(model.module)), copy.deepcopy(model.module)):
        assert torch.equal(twin(x), model.module(x))
        assert type(twin[0]) is LAYERS[mode]
