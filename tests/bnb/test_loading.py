"""State dicts of quantised layers: bit-equal round trips, floating-point weights, and everything that does not fit."""

import warnings

import pytest
import torch
from torch import nn

from fabric_bnb import QuantizedLinear4bit, QuantizedLinear8bit, TrainableLinear8bit
from fabric_core import Fabric
from fabric_core.checkpoint.sharded import ranks_of, write_sharded
from fabric_core.errors import CheckpointError, CheckpointKeyError
from fabric_core.module_init import EmptyInit

KINDS = {
    "nf4": (QuantizedLinear4bit, {"quant_type": "nf4"}),
    "nf4-dq": (QuantizedLinear4bit, {"quant_type": "nf4", "nested": True}),
    "fp4": (QuantizedLinear4bit, {"quant_type": "fp4"}),
    "fp4-dq": (QuantizedLinear4bit, {"quant_type": "fp4", "nested": True}),
    "int8": (QuantizedLinear8bit, {}),
}
FROZEN = pytest.mark.parametrize("mode", list(KINDS))


def plain(seed, inputs=64, outputs=32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs))


def layer_of(mode, linear, quantize=True):
    cls, settings = KINDS[mode]
    layer = cls.of(linear, **settings)
    if quantize:
        layer.quantize()
    return layer


def network(mode, seed=0, state="quantized", inputs=64, outputs=32):
    """A quantised layer in one of its states, and a norm."""
    cls, settings = KINDS[mode]
    module = plain(seed, inputs, outputs)
    if state == "meta":
        module[0] = cls(inputs, outputs, device="meta", **settings)
    elif state == "empty":
        with EmptyInit():
            module[0] = cls(inputs, outputs, **settings)
    else:
        module[0] = layer_of(mode, module[0], quantize=state == "quantized")
    return module


def copied(state_dict):
    return {key: value.clone() for key, value in state_dict.items()}


def equal(state_dict, other):
    return list(state_dict) == list(other) and all(torch.equal(state_dict[key], other[key]) for key in other)


@FROZEN
@pytest.mark.parametrize("state", ["quantized", "unquantized", "meta", "empty"])
@pytest.mark.parametrize("assign", [False, True])
def test_quantized_weights_are_taken_bit_by_bit_whatever_the_layer_held(mode, state, assign):
    saved = copied(network(mode, seed=1).state_dict())
    module = network(mode, seed=2, state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(module.load_state_dict(saved, assign=assign)) == "<All keys matched successfully>"
    assert equal(module.state_dict(), saved)
    assert torch.equal(module(torch.ones(2, 64)), network(mode, seed=1)(torch.ones(2, 64)))


@FROZEN
@pytest.mark.parametrize("state", ["quantized", "meta", "empty"])
def test_floating_point_weights_are_quantized_while_they_are_loaded(mode, state):
    module = network(mode, seed=2, state=state)
    module.load_state_dict(plain(1).state_dict())
    assert equal(module.state_dict(), network(mode, seed=1).state_dict())


@FROZEN
def test_floating_point_weights_stay_so_in_a_layer_that_is_still_to_be_quantized(mode):
    module = network(mode, seed=2, state="unquantized")
    module.load_state_dict(plain(1).state_dict())
    assert equal(module.state_dict(), plain(1).state_dict())
    module[0].quantize()
    assert equal(module.state_dict(), network(mode, seed=1).state_dict())


@FROZEN
def test_what_was_loaded_is_a_copy(mode):
    saved = network(mode, seed=1).state_dict()
    module = network(mode, seed=2)
    module.load_state_dict(saved)
    before = copied(module.state_dict())
    for value in saved.values():
        value.zero_()
    assert equal(module.state_dict(), before)


@FROZEN
def test_the_parameter_is_the_same_object_after_loading(mode):
    module = network(mode)
    weight = module[0].weight
    module.load_state_dict(network(mode, seed=1).state_dict())
    assert module[0].weight is weight


@FROZEN
def test_a_missing_weight_is_missing_and_a_stray_scale_unexpected(mode):
    saved = network(mode).state_dict()
    del saved["0.weight"]
    scale = "0.SCB" if mode == "int8" else "0.weight.absmax"
    with pytest.raises(RuntimeError, match=r"Missing key.*\"0\.weight\""):
        network(mode).load_state_dict(saved)
    result = network(mode).load_state_dict(saved, strict=False)
    assert result.missing_keys == ["0.weight"]
    assert scale in result.unexpected_keys


@FROZEN
def test_keys_that_belong_to_nothing_are_unexpected(mode):
    saved = {**network(mode).state_dict(), "0.weight.shine": torch.ones(1), "0.other": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight\.shine.*0\.other"):
        network(mode).load_state_dict(saved)
    network(mode).load_state_dict(saved, strict=False)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize("part", ["absmax", "quant_map"])
def test_a_weight_without_its_scales_is_refused(mode, part):
    saved = network(mode).state_dict()
    del saved[f"0.weight.{part}"]
    with pytest.raises(RuntimeError, match=rf"0\.weight cannot be used without {part}"):
        network(mode).load_state_dict(saved)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_small_integers_without_any_scales_are_refused(mode):
    saved = {key: value for key, value in network(mode).state_dict().items() if key in ("0.weight", "0.bias")}
    with pytest.raises(RuntimeError, match=r"0\.weight .*(SCB|scales)"):
        network(mode).load_state_dict(saved, strict=False)


@pytest.mark.parametrize(("saved", "mode"), [("nf4", "fp4"), ("nf4", "nf4-dq"), ("int8", "nf4"), ("nf4", "int8")])
def test_weights_of_another_mode_are_refused_and_the_message_names_it(saved, mode):
    module = network(mode)
    before = copied(module.state_dict())
    with pytest.raises(RuntimeError, match=f"0.weight is quantised as '{saved}' .*precision='bnb-{saved}'"):
        module.load_state_dict(network(saved, seed=1).state_dict())
    assert torch.equal(module.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_layer_to_train_takes_no_quantized_weights(mode):
    layer = TrainableLinear8bit.of(plain(0)[0])
    before = copied(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"the layer is in floating point.*'bnb-{mode}'"):
        layer.load_state_dict(network(mode)[0].state_dict(), strict=False)
    assert equal(layer.state_dict(), before)


def test_a_layer_to_train_takes_and_gives_floating_point_weights():
    layer, linear = TrainableLinear8bit.of(plain(0)[0]), plain(1)[0]
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight.half())
    linear.load_state_dict(layer.state_dict())


@FROZEN
@pytest.mark.parametrize("saved", ["quantized", "floating"])
def test_other_sizes_are_refused(mode, saved):
    other = network(mode, inputs=32, outputs=64) if saved == "quantized" else plain(0, 32, 64)
    with pytest.raises(RuntimeError, match=r"0\.weight is \(64, 32\).* in the state dict and \(32, 64\)"):
        network(mode).load_state_dict(other.state_dict())


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_a_quant_state_that_cannot_be_read_is_refused(mode):
    saved = network(mode).state_dict()
    saved[f"0.weight.quant_state.bitsandbytes__{mode[:3]}"] = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"0\.weight has a quant state .* that cannot be read"):
        network(mode).load_state_dict(saved)


@FROZEN
def test_hooks_that_rename_keys_run_first(mode):
    def rename(module, state_dict, prefix, *_):
        for key in [key for key in state_dict if key.startswith(f"{prefix}old_")]:
            state_dict[prefix + key.removeprefix(f"{prefix}old_")] = state_dict.pop(key)

    layer, saved = network(mode, seed=2)[0], network(mode, seed=1)[0].state_dict()
    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict({f"old_{key}": value for key, value in saved.items()})
    assert equal(layer.state_dict(), saved)


@FROZEN
def test_bitsandbytes_own_layers_read_what_ours_write(mode):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

    saved = network(mode)[0].state_dict()
    if mode == "int8":
        theirs = Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        theirs.load_state_dict(saved)
    else:
        theirs = Linear4bit(64, 32, quant_type=mode[:3])
        scales = {key: value for key, value in saved.items() if key.startswith("weight.")}
        theirs.weight = Params4bit.from_prequantized(saved["weight"], scales, device="cpu", module=theirs)
        theirs.bias.data = saved["bias"]
    x = torch.randn(4, 64, dtype=torch.float16 if mode == "int8" else torch.float32)
    close = 2e-3 if mode == "int8" else 1e-5  # theirs adds up in float16
    torch.testing.assert_close(theirs.train()(x), network(mode)[0].train()(x), rtol=close, atol=close)


def fabric_of(mode):
    return Fabric(accelerator="cpu", devices=1, precision=f"bnb-{mode}")


@pytest.mark.parametrize("mode", [*KINDS, "int8-training"])
def test_a_checkpoint_comes_back_bit_by_bit(mode, tmp_path):
    fabric = fabric_of(mode)
    saved, loaded = fabric.setup(plain(1)), fabric.setup(plain(2))
    fabric.save(tmp_path / "model.ckpt", {"model": saved, "step": 3})
    rest = fabric.load(tmp_path / "model.ckpt", {"model": loaded})
    assert rest == {"step": 3}
    assert equal(loaded.state_dict(), saved.state_dict())


@FROZEN
def test_a_checkpoint_in_floating_point_is_quantized_while_it_is_loaded(mode, tmp_path):
    ordinary = Fabric(accelerator="cpu", devices=1)
    ordinary.save(tmp_path / "model.ckpt", {"model": ordinary.setup(plain(1))})
    fabric = fabric_of(mode)
    with fabric.init_module(empty_init=True):
        module = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32, dtype=torch.float32))
    fabric.load(tmp_path / "model.ckpt", {"model": module})
    model = fabric.setup(module)
    quantized = network(mode, seed=1).state_dict()
    assert torch.equal(model.state_dict()["0.weight"], quantized["0.weight"])


@FROZEN
def test_a_raw_checkpoint_comes_back_too(mode, tmp_path):
    fabric = fabric_of(mode)
    saved, loaded = fabric.setup(plain(1)), fabric.setup(plain(2))
    torch.save(saved.state_dict(), tmp_path / "raw.pt")
    fabric.load_raw(tmp_path / "raw.pt", loaded)
    assert equal(loaded.state_dict(), saved.state_dict())


@pytest.mark.parametrize("mode", [*KINDS, "int8-training"])
def test_a_checkpoint_with_unknown_keys_changes_nothing(mode, tmp_path):
    fabric = fabric_of(mode)
    fabric.save(tmp_path / "model.ckpt", {"model": {**fabric.setup(plain(1)).state_dict(), "other": torch.ones(1)}})
    model = fabric.setup(plain(2))
    before = copied(model.state_dict())
    with pytest.raises(CheckpointKeyError, match=r"Nothing was loaded\. Unknown to the module: other"):
        fabric.load(tmp_path / "model.ckpt", {"model": model})
    assert equal(model.state_dict(), before)


OTHER = {"nf4": "fp4", "nf4-dq": "fp4-dq", "fp4": "nf4", "fp4-dq": "nf4-dq", "int8": "nf4", "int8-training": "nf4"}


def spoiled(state, mode, wrong):
    if wrong == "mode":
        return fabric_of(OTHER[mode]).setup(plain(1)).state_dict(), "is quantised as"
    if wrong == "size":
        return fabric_of(mode).setup(
            plain(1, inputs=128)
        ).state_dict(), r"(\(32, 128\) .*and \(32, 64\)|has 2048 bytes)"
    if wrong == "bias":
        return state | {"0.bias": torch.ones(3)}, r"0\.bias is \(3,\) in the state dict and \(32,\) in the layer"
    if wrong == "unknown":
        return state | {"0.more": torch.ones(3)}, r"0\.more is unknown to the layer"
    return {key: value for key, value in state.items() if key != "0.weight"}, r"0\.weight is missing in the state dict"


@pytest.mark.parametrize("mode", [*KINDS, "int8-training"])
@pytest.mark.parametrize("wrong", ["mode", "size", "bias", "unknown", "missing"])
@pytest.mark.parametrize("layout", ["file", "sharded"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(mode, wrong, layout, tmp_path):
    fabric = fabric_of(mode)
    state, message = spoiled(fabric.setup(plain(1)).state_dict(), mode, wrong)
    if layout == "file":
        fabric.save(tmp_path / "ck", {"model": state})
    else:
        write_sharded(tmp_path / "ck", {"model": state}, {}, ranks_of())
    model = fabric.setup(plain(2))
    before = copied(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"Nothing was loaded\. .*{message}"):
        fabric.load(tmp_path / "ck", {"model": model})
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("mode", [*KINDS, "int8-training"])
def test_a_sharded_checkpoint_comes_back_bit_by_bit(mode, tmp_path):
    fabric = fabric_of(mode)
    saved, loaded = fabric.setup(plain(1)), fabric.setup(plain(2))
    write_sharded(tmp_path / "ck", {"model": saved.state_dict()}, {}, ranks_of())
    fabric.load(tmp_path / "ck", {"model": loaded})
    assert equal(loaded.state_dict(), saved.state_dict())


class Adapted(nn.Module):
    """A quantised layer that somebody has given more state."""

    def __init__(self, seed):
        super().__init__()
        self.fc = plain(seed)[0]
        self.out = nn.Linear(32, 4)

    def extend(self):
        self.fc.scale = nn.Parameter(torch.randn(3))
        self.fc.register_buffer("seen", torch.randn(2))
        self.fc.register_buffer("scratch", torch.randn(2), persistent=False)
        self.fc.adapter = nn.Linear(2, 2)
        return self


@pytest.mark.parametrize("mode", [*KINDS, "int8-training"])
def test_what_else_a_layer_holds_is_no_problem(mode, tmp_path):
    fabric = fabric_of(mode)
    saved, loaded = (fabric.setup(Adapted(seed)) for seed in (1, 2))
    saved.module.extend(), loaded.module.extend()
    fabric.save(tmp_path / "ck", {"model": saved})
    fabric.load(tmp_path / "ck", {"model": loaded})
    assert equal(loaded.state_dict(), saved.state_dict())


def test_names_are_told_as_they_are(tmp_path):
    fabric_of("int8").save(tmp_path / "ck", {"model": fabric_of("int8").setup(Adapted(1))})
    fabric = fabric_of("nf4")
    with pytest.raises(
        CheckpointError, match=r"loaded\. fc\.weight is quantised .* dict in floating point\. out\.weight"
    ):
        fabric.load(tmp_path / "ck", {"model": fabric.setup(Adapted(2))})


@FROZEN
def test_what_a_hook_renames_is_not_judged_beforehand(mode, tmp_path):
    fabric = fabric_of(mode)
    saved, loaded = fabric.setup(plain(1)), fabric.setup(plain(2))
    state = {key.replace("0.weight", "0.kernel"): value for key, value in saved.state_dict().items()}
    fabric.save(tmp_path / "ck", {"model": state})

    def rename(module, state_dict, prefix, *_):
        for key in [key for key in state_dict if key.startswith(f"{prefix}kernel")]:
            state_dict[key.replace("kernel", "weight")] = state_dict.pop(key)

    loaded.module[0].register_load_state_dict_pre_hook(rename)
    fabric.load(tmp_path / "ck", {"model": loaded})
    assert equal(loaded.state_dict(), saved.state_dict())
