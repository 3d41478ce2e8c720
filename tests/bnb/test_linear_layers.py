"""The quantised layers by themselves: what they compute, how their weight gets quantised, and that they are copied."""

import copy
import pickle

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.nn import functional

from fabric_bnb import QuantizedLinear4bit, QuantizedLinear8bit, TrainableLinear8bit
from fabric_core.errors import UsageError
from fabric_core.module_init import EmptyInit, materialize_meta

KINDS = {
    "nf4": (QuantizedLinear4bit, {"quant_type": "nf4"}),
    "nf4-dq": (QuantizedLinear4bit, {"quant_type": "nf4", "nested": True}),
    "fp4": (QuantizedLinear4bit, {"quant_type": "fp4"}),
    "fp4-dq": (QuantizedLinear4bit, {"quant_type": "fp4", "nested": True}),
    "int8": (QuantizedLinear8bit, {}),
}
VERSION = tuple(map(int, bitsandbytes.__version__.split(".")[:2]))
FROZEN = pytest.mark.parametrize("mode", list(KINDS))
ALL = pytest.mark.parametrize("mode", [*KINDS, "int8-training"])


def linear(inputs=256, outputs=256, **arguments):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, **arguments)


def unquantized(mode, *sizes, **arguments):
    cls, settings = KINDS.get(mode, (TrainableLinear8bit, {}))
    return cls.of(linear(*sizes, **arguments), **settings)


def quantized(mode, *sizes, **arguments):
    layer = unquantized(mode, *sizes, **arguments)
    layer.quantize()
    return layer


def inputs(*shape, **arguments):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **arguments)


def relative(value, expected):
    return float((value - expected).detach().norm() / expected.detach().norm())


def same(layer, other):
    """Bit-equal weights and scales."""
    mine, theirs = layer.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


# Measured with normal inputs and torch's default weights: 0.093, 0.112, 0.0082. In training mode bitsandbytes' CPU code
# quantises the weight only, at 0.004.
@pytest.mark.parametrize(
    ("mode", "bounds"),
    {
        "nf4": (0.08, 0.105),
        "nf4-dq": (0.08, 0.105),
        "fp4": (0.10, 0.125),
        "fp4-dq": (0.10, 0.125),
        "int8": (0.004, 0.012),
    }.items(),
)
def test_the_error_against_single_precision_is_that_of_the_mode(mode, bounds):
    layer, x = quantized(mode).eval(), inputs(64, 256)
    least, most = bounds
    assert least < relative(layer(x), linear()(x)) < most


def test_training_in_8_bits_has_the_error_of_8_bits():
    x = inputs(64, 256)
    assert 0.002 < relative(unquantized("int8-training")(x), linear()(x)) < 0.012


@FROZEN
def test_the_product_is_the_one_with_the_dequantized_weight(mode):
    layer, x = quantized(mode, 64, 96), inputs(8, 64)
    expected = functional.linear(x, layer.dequantize().float(), layer.bias)
    assert relative(layer(x), expected) < 2e-3  # int8 multiplies in float16


@FROZEN
def test_a_layer_is_one_of_bitsandbytes_and_its_weight_is_frozen(mode):
    layer = quantized(mode)
    assert isinstance(layer, Linear4bit if "4" in mode else Linear8bitLt)
    assert isinstance(layer, nn.Linear)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.weight.nbytes == 256 * 256 * (0.5 if "4" in mode else 1)


@ALL
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64)])
def test_any_number_of_dimensions_has_the_gradients_of_two(mode, shape):
    layer, x = unquantized(mode, 64, 32), inputs(*shape, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    flat_layer, flat = unquantized(mode, 64, 32), inputs(*shape).view(-1, 64).requires_grad_()
    flat_layer(flat).square().sum().backward()
    assert y.shape == (*shape[:-1], 32)
    torch.testing.assert_close(x.grad.view(-1, 64), flat.grad)
    torch.testing.assert_close(layer.bias.grad, flat_layer.bias.grad)


@FROZEN
@pytest.mark.parametrize("train", [True, False])
def test_gradients_flow_to_the_input(mode, train):
    layer, x = quantized(mode, 64, 32).train(train), inputs(8, 64, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(8, 32) @ layer.dequantize().float()
    assert relative(x.grad, expected) < 2e-3


def test_the_weight_that_is_trained_in_8_bits_gets_its_gradient():
    layer, x = unquantized("int8-training", 64, 32), inputs(2, 8, 64)
    layer(x).square().sum().backward()
    plain = linear(64, 32)
    plain(x).square().sum().backward()
    assert layer.weight.grad.dtype is torch.float16
    assert relative(layer.weight.grad.float(), plain.weight.grad) < 0.02
    assert relative(layer.bias.grad, plain.bias.grad) < 0.02


@pytest.mark.parametrize("train", [True, False])
def test_a_step_is_seen_by_the_next_product(train):
    """Also after ``zero_grad(set_to_none=False)``, from which bitsandbytes' own layer goes on with old values."""
    layer, x = unquantized("int8-training", 64, 32), inputs(8, 64)
    layer(x).sum().backward()
    layer.zero_grad(set_to_none=False)
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.train(train)
    assert relative(layer(x), functional.linear(x, layer.weight.float(), layer.bias)) < 0.012


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input_and_the_bias_keeps_its_own(mode, dtype):
    layer = unquantized(mode, 64, 32)
    assert layer(inputs(4, 64, dtype=dtype)).dtype is dtype
    assert layer.bias.dtype is torch.float32


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_compute_in_the_dtype_that_is_asked_for(mode, dtype):
    layer = quantized(mode, 64, 32)
    layer.compute_dtype = dtype
    x = inputs(4, 64)
    exact = functional.linear(x.to(dtype), layer.dequantize().to(dtype), layer.bias.to(dtype)).float()
    assert relative(layer(x), exact) < 4 * torch.finfo(dtype).eps


@ALL
@pytest.mark.parametrize("sizes", [(7, 5), (65, 33), (1, 1), (130, 96)])
def test_any_size_works(mode, sizes):
    if "4" in mode and sizes[0] * sizes[1] % 2 and VERSION < (0, 50):
        pytest.skip("bitsandbytes before 0.50 does not quantise an odd number of values to 4 bits on the CPU")
    layer, x = unquantized(mode, *sizes), inputs(3, sizes[0], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert relative(y, linear(*sizes)(x)) < 0.5
    assert torch.isfinite(x.grad).all()


@ALL
def test_no_input_gives_no_output(mode):
    assert unquantized(mode, 64, 64)(torch.empty(0, 64)).shape == (0, 64)
    assert unquantized(mode, 64, 32)(torch.empty(0, 64)).shape == (0, 32)


@ALL
def test_no_bias(mode):
    layer = unquantized(mode, 64, 32, bias=False)
    assert layer.bias is None
    assert relative(layer(inputs(4, 64)), linear(64, 32, bias=False)(inputs(4, 64))) < 0.2


@FROZEN
def test_inference_leaves_the_bits_alone(mode):
    """On some CPUs bitsandbytes' own 4-bit layer rearranges its weight then, and saves something else afterwards."""
    layer = quantized(mode).eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.inference_mode():
        layer(inputs(4, 256))
    after = layer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@FROZEN
def test_a_layer_quantizes_itself_in_the_first_forward_at_the_latest(mode):
    layer = unquantized(mode)
    assert not layer.is_quantized
    y = layer(inputs(4, 256))
    assert layer.is_quantized
    assert torch.equal(y, quantized(mode)(inputs(4, 256)))


@FROZEN
def test_a_layer_keeps_bias_mode_and_hooks_of_the_one_it_replaces(mode):
    cls, settings = KINDS[mode]
    plain, seen = linear().eval(), []
    plain.register_forward_hook(lambda *_: seen.append(1))
    layer = cls.of(plain, **settings)
    layer(inputs(1, 256))
    assert layer.bias is plain.bias
    assert not layer.training
    assert seen == [1]


def test_the_parameters_that_are_trained_are_those_of_the_layer_it_replaces():
    plain = linear()
    weight, bias = plain.weight, plain.bias
    layer = TrainableLinear8bit.of(plain)
    assert layer.weight is weight
    assert layer.bias is bias
    assert weight.dtype is torch.float16


@FROZEN
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("make", [quantized, unquantized])
def test_copies_are_equal_and_apart(mode, twin, make):
    layer = make(mode, 64, 32)
    other, x = twin(layer), inputs(4, 64)
    assert same(other, layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.count_nonzero()
    assert type(other.weight) is type(layer.weight)


@FROZEN
def test_casting_the_module_leaves_weight_and_scales_alone(mode):
    layer = quantized(mode)
    before = layer.state_dict()
    after = layer.to(torch.bfloat16).state_dict()
    kept = [key for key in before if key != "bias"]
    assert all(torch.equal(after[key], before[key]) for key in kept)
    assert layer.bias.dtype is torch.bfloat16


@FROZEN
def test_casting_and_moving_on_the_cpu_comes_before_quantizing(mode):
    layer = unquantized(mode).to("cpu").to(torch.bfloat16)
    assert not layer.is_quantized
    assert layer.weight.dtype is torch.bfloat16


@ALL
def test_a_layer_made_as_linear_is_made_draws_the_same_values(mode):
    cls, settings = KINDS.get(mode, (TrainableLinear8bit, {}))
    torch.manual_seed(0)
    layer = cls(256, 128, **settings)
    drawn = linear(256, 128)
    torch.testing.assert_close(layer.weight.float(), drawn.weight, rtol=1e-3, atol=1e-4)
    assert torch.equal(layer.bias, drawn.bias)


@FROZEN
def test_a_layer_on_the_meta_device_has_no_values_to_quantize(mode):
    cls, settings = KINDS[mode]
    layer = cls(8, 4, device="meta", **settings)
    assert layer.weight.is_meta
    with pytest.raises(UsageError, match="to_empty"):
        layer.quantize()


@FROZEN
def test_memory_that_nobody_filled_is_quantized_and_reads_as_nan(mode):
    cls, settings = KINDS[mode]
    layer = cls(64, 32, device="meta", **settings).to_empty(device="cpu")
    assert layer.is_quantized
    assert layer.weight.nbytes == 64 * 32 * (0.5 if "4" in mode else 1)
    nn.init.zeros_(layer.bias)
    assert layer(inputs(4, 64)).isnan().all()


@FROZEN
def test_reset_parameters_draws_and_quantizes(mode):
    cls, settings = KINDS[mode]
    layer = cls(64, 32, device="meta", **settings).to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert same(layer, quantized(mode, 64, 32))


@FROZEN
def test_a_module_that_is_materialised_is_what_it_would_have_been(mode):
    cls, settings = KINDS[mode]
    module = nn.Sequential(cls(64, 32, device="meta", **settings))
    torch.manual_seed(0)
    materialize_meta(module, "cpu")
    assert same(module[0], quantized(mode, 64, 32))


@FROZEN
def test_skipped_initialisation_leaves_small_memory_without_values(mode):
    cls, settings = KINDS[mode]
    with EmptyInit():
        layer = cls(64, 32, **settings)
        layer.reset_parameters()
    assert layer.is_quantized
    assert layer.dequantize().isnan().all()


@FROZEN
def test_a_quantized_layer_gives_its_memory_back_on_the_meta_device(mode):
    layer = quantized(mode, 64, 32).to("meta")
    assert not layer.is_quantized
    assert layer.weight.shape == (32, 64)
    torch.manual_seed(0)
    layer.to_empty(device="cpu").reset_parameters()
    assert same(layer, quantized(mode, 64, 32))


@FROZEN
def test_a_layer_says_what_it_is(mode):
    assert f"mode={mode!r}, quantized=True" in repr(quantized(mode))


def test_torchs_transformer_layers_do_not_take_the_weights_past_the_layers():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).half().eval()
    x = inputs(2, 5, 64, dtype=torch.float16)
    expected = block(x)
    block.linear1, block.linear2 = QuantizedLinear8bit.of(block.linear1), QuantizedLinear8bit.of(block.linear2)
    with torch.no_grad():
        assert relative(block(x).float(), expected.float()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@FROZEN
def test_moving_to_an_accelerator_quantizes_there(mode):
    layer = unquantized(mode).to("cuda")
    assert layer.is_quantized
    assert all(scale.is_cuda for scale in layer.statistics())
    x = inputs(64, 256)
    assert relative(layer(x.cuda()).cpu(), linear()(x)) < 0.13
    back = layer.to("cpu")
    assert relative(back(x), linear()(x)) < 0.13
