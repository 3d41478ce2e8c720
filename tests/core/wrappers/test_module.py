"""The wrapped module: the user's module in every respect but the call."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.wrappers import FabricModule


class Model(nn.Module):
    """Has whatever a user may want to reach through the wrapper."""

    constant = "of the class"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.note = "mine"
        self._private = 1

    def forward(self, x):
        return self.norm(self.layer(x))

    def describe(self, word="plain"):
        return f"{word} {self.note}"

    @property
    def width(self):
        return self.layer.out_features

    @width.setter
    def width(self, value):
        self.note = f"width {value}"

    @classmethod
    def named(cls):
        return cls.__name__


@pytest.fixture(params=["single", "fake"])
def model(request, fake_backend):
    """The wrapper, once around the bare module and once around one that a strategy wrapped."""
    devices = {"single": dict(accelerator="cpu", devices=1), "fake": dict(accelerator="fake", strategy="fake")}
    fabric = Fabric(**devices[request.param])
    fabric.launch()
    return fabric.setup(Model())


def test_attributes_methods_and_properties_are_the_modules(model):
    assert (model.note, model._private, model.constant, model.width) == ("mine", 1, "of the class", 2)
    assert model.describe(word="my") == "my mine"
    assert model.named() == "Model"
    assert model.layer is model.module.layer


def test_a_missing_attribute_is_missed_under_the_modules_name(model):
    with pytest.raises(AttributeError, match="'Model' object has no attribute 'absent'"):
        model.absent  # noqa: B018
    assert getattr(model, "absent", "default") == "default"


def test_new_attributes_land_on_the_module(model):
    model.fresh = 3
    assert model.module.fresh == 3
    assert "fresh" not in vars(model)


def test_known_attributes_are_changed_where_they_are(model):
    model.note, model.width = "changed", 5
    assert model.module.note == "width 5"
    assert "note" not in vars(model)


def test_attributes_of_both_are_changed_on_both(model):
    model.training = False
    assert model.module.training is False
    assert vars(model)["training"] is False


def test_deleting_deletes_from_the_module(model):
    del model.note
    assert not hasattr(model.module, "note")
    with pytest.raises(AttributeError):
        del model.absent


def test_a_submodule_can_be_replaced_through_the_wrapper(model):
    model.layer = nn.Linear(2, 2, bias=False)
    assert "layer.bias" not in model.state_dict()
    model.extra = nn.Parameter(torch.zeros(1))
    assert "extra" in dict(model.named_parameters())


def test_what_is_registered_on_the_wrapper_belongs_to_the_module(model):
    model.register_buffer("steps", torch.zeros(1))
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    model.add_module("head", nn.Linear(1, 1))
    model.register_module("tail", nn.Linear(1, 1))
    assert model.steps is model.module.steps
    assert {"steps", "gain", "head.weight", "tail.weight"} <= set(model.state_dict())


def test_names_carry_no_prefix(model):
    names = set(model.module.state_dict())
    assert set(model.state_dict()) == names
    found = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert found == names


def test_parameters_are_the_very_same(model):
    assert [id(p) for p in model.parameters()] == [id(p) for p in model.module.parameters()]
    assert model.get_parameter("layer.weight") is model.module.layer.weight
    assert model.get_submodule("layer") is model.module.layer


def test_a_state_dict_loads_into_the_module(model):
    other = Model()
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(model.layer.weight, other.layer.weight)
    with pytest.raises(RuntimeError, match=r"layer\.weight"):
        model.load_state_dict({})
    model.load_state_dict({}, strict=False)


def test_a_state_dict_can_be_assigned(model):
    state = Model().state_dict()
    model.load_state_dict(state, assign=True)
    assert model.layer.weight.data_ptr() == state["layer.weight"].data_ptr()


def test_train_and_eval_reach_every_part(model):
    assert model.eval() is model
    assert not any(m.training for m in (model, model.module, model.norm, model._forward_module))
    model.train()
    assert all(m.training for m in (model, model.module, model.norm, model._forward_module))


def test_gradients_are_cleared_and_frozen_through_the_wrapper(model):
    model(torch.randn(4, 2)).sum().backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.module.parameters())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.module.parameters())


def test_conversion_reaches_the_parameters(model):
    assert model.double() is model
    assert model.module.layer.weight.dtype == torch.float64
    assert model.dtype == torch.float64
    assert model.to("meta").device.type == "meta"


def test_apply_and_modules_reach_every_part(model):
    seen = []
    model.apply(lambda m: seen.append(type(m).__name__))
    assert {"Linear", "BatchNorm1d", "Model"} <= set(seen)
    assert model.module in set(model.modules())


def test_the_device_and_dtype_are_those_of_the_first_tensor(model):
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


class Opinionated(nn.Linear):
    device, dtype = torch.device("meta"), torch.float16


class Vague(nn.Module):
    device, dtype = "somewhere", None


def test_a_module_that_names_its_device_and_dtype_is_believed():
    model = Fabric(accelerator="cpu", devices=1).setup(Opinionated(1, 1))
    assert (model.device, model.dtype) == (torch.device("meta"), torch.float16)


def test_a_module_without_tensors_is_where_the_strategy_is():
    model = Fabric(accelerator="cpu", devices=1).setup(Vague())
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_integer_tensors_do_not_decide_the_dtype():
    module = nn.Module()
    module.register_buffer("index", torch.arange(2))
    module.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert Fabric(accelerator="cpu", devices=1).setup(module).dtype == torch.float64


def test_hooks_registered_on_the_wrapper_run(model):
    order = []
    model.register_forward_pre_hook(lambda m, args: order.append("before"))
    model.register_forward_hook(lambda m, args, out: order.append("after"))
    model(torch.randn(4, 2))
    assert order == ["before", "after"]


def test_a_forward_hook_may_change_input_and_output(model):
    model.eval()
    model.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    handle = model.register_forward_hook(lambda m, args, out: out + 100)
    changed = model(torch.randn(4, 2))
    handle.remove()
    assert torch.allclose(changed, model(torch.zeros(4, 2)) + 100)


def test_backward_hooks_registered_on_the_wrapper_run(model):
    seen = []
    model.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].shape))
    model(torch.randn(4, 2, requires_grad=True)).sum().backward()
    assert seen == [(4, 2)]


def test_hooks_of_the_users_module_run(model):
    seen = []
    model.module.register_forward_hook(lambda m, args, out: seen.append("ran"))
    model(torch.randn(4, 2))
    assert seen == ["ran"]


def test_a_copy_is_independent_and_wrapped(model):
    model.mark_forward_method("describe")
    twin = copy.deepcopy(model)
    assert type(twin) is FabricModule
    nn.init.zeros_(twin.layer.weight)
    assert model.layer.weight.abs().sum() > 0
    assert twin(torch.ones(4, 2)).shape == (4, 2)
    assert "describe" in twin._forward_methods


def test_a_copy_shares_what_its_parts_share(model):
    twin = copy.deepcopy(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in twin._forward_module.parameters()]
    assert len({id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}) == 0


def test_a_wrapped_module_survives_pickling(model):
    model.eval()
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(4, 2)
    assert torch.equal(twin(x), model(x))
    assert twin.note == "mine"


def test_a_wrapped_module_can_be_a_part_of_another(model):
    outer = nn.Sequential(model, nn.Linear(2, 1))
    assert outer(torch.randn(4, 2)).shape == (4, 1)
    assert len(list(outer.parameters())) == len(list(model.parameters())) + 2


def test_outputs_keep_their_containers(model):
    class Nested(nn.Module):
        def forward(self, x, *, scale):
            return {"out": x * scale, "text": "kept", "pair": (x, 3)}

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    result = fabric.setup(Nested())(torch.ones(1), scale=2)
    assert result["out"].item() == 2.0
    assert (result["text"], result["pair"][1]) == ("kept", 3)


def test_the_mode_of_the_module_is_the_wrappers_from_the_start():
    module = nn.Linear(2, 1).eval()
    wrapped = Fabric(accelerator="cpu", devices=1).setup(module)
    assert not wrapped.training
    assert not copy.deepcopy(wrapped).training
