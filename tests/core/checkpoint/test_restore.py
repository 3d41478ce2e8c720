"""What comes back is what plain torch would give, in the memory that was there, and bad input changes nothing."""

import array
import copy
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.checkpoint.restore import Access, restore
from fabric_core.checkpoint.state import collect_state
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.write import write_checkpoint
from fabric_core.errors import CheckpointError, CheckpointKeyError

DATA = Path(__file__).with_name("data")


class MinimalIO(CheckpointIO):
    """Only what the contract demands, without the optional keywords."""

    def save_checkpoint(self, checkpoint, path):
        torch.save(checkpoint, path)

    def load_checkpoint(self, path):
        return torch.load(path)

    def remove_checkpoint(self, path):
        os.unlink(path)


@pytest.fixture(params=[TorchCheckpointIO, MinimalIO])
def io(request):
    return request.param()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.ckpt"


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(seed=0, optimizer=torch.optim.AdamW, steps=2, **kwargs):
    module = network(seed)
    optimizer = optimizer(module.parameters(), **{"lr": 0.01, **kwargs})
    for i in range(steps):
        optimizer.zero_grad()
        module(torch.randn(5, 3) + i).square().sum().backward()
        optimizer.step()
    return module, optimizer


def save(path, **state):
    write_checkpoint(TorchCheckpointIO(), path, collect_state(state))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_modules_optimizers_and_values_come_back_and_the_rest_is_returned(io, path):
    module, optimizer = trained()
    save(path, model=module, optimizer=optimizer, epoch=3, extra=torch.arange(3), more=[1])
    other, its_optimizer = trained(seed=1)
    state = {"model": other, "optimizer": its_optimizer, "epoch": 0}
    rest = restore(io, path, state)
    assert same(other.state_dict(), module.state_dict())
    assert same(its_optimizer.state_dict(), optimizer.state_dict())
    assert (state["epoch"], state["model"]) == (3, other)
    assert same(rest, {"extra": torch.arange(3), "more": [1]})


def test_tensors_are_read_into_the_memory_that_is_there(path):
    module, optimizer = trained()
    save(path, model=module, optimizer=optimizer)
    other, its_optimizer = trained(seed=1)
    before = [t.data_ptr() for t in other.state_dict().values()]
    moments = [s["exp_avg"] for s in its_optimizer.state.values()]
    restore(TorchCheckpointIO(), path, {"model": other, "optimizer": its_optimizer})
    assert [t.data_ptr() for t in other.state_dict().values()] == before
    assert all(s["exp_avg"] is m for s, m in zip(its_optimizer.state.values(), moments, strict=True))


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Rprop", "LBFGS"])
@pytest.mark.parametrize("steps", [0, 1])
def test_training_goes_on_as_if_never_interrupted(path, kind, steps):
    def train(module, optimizer):
        torch.manual_seed(7)
        inputs = torch.randn(5, 3)

        def closure():
            optimizer.zero_grad()
            loss = module(inputs).square().sum()
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(3)]

    module = network(0)
    optimizer = getattr(torch.optim, kind)(module.parameters(), lr=0.01)
    train(module, optimizer)
    save(path, model=module, optimizer=optimizer)
    other = network(1)
    its_optimizer = getattr(torch.optim, kind)(other.parameters(), lr=0.5)
    if steps:
        train(other, its_optimizer)
    restore(TorchCheckpointIO(), path, {"model": other, "optimizer": its_optimizer})
    assert train(other, its_optimizer) == train(module, optimizer)


class Odd(nn.Module):
    """Every kind of tensor that goes its own way."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.plain = nn.Parameter(torch.randn(5, 7, dtype=dtype))
        self.tied = self.plain
        self.transposed = nn.Parameter(torch.randn(4, 6, dtype=dtype).t())
        self.strided = nn.Parameter(torch.randn(6, 8, dtype=dtype)[::2, 1::3])
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(torch.randn((), dtype=dtype))
        self.empty = nn.Parameter(torch.randn(0, 3))
        for name, value in {
            "b16": torch.randn(3).bfloat16(),
            "flags": torch.rand(9) > 0.5,
            "complex": torch.randn(3, dtype=torch.cfloat),
            "ints": torch.randint(100, (3,)),
            "f8": torch.randn(3).to(torch.float8_e4m3fn),
            "expanded": torch.randn(3, 1).expand(3, 2),
            "none": None,
        }.items():
            self.register_buffer(name, value)
        flat = torch.randn(10)
        self.register_buffer("first", flat[:6])
        self.register_buffer("second", flat[6:])
        self.register_buffer("forgotten", torch.randn(2), persistent=False)


def odd_for_loading(seed=1, **kwargs):
    module = Odd(seed, **kwargs)
    module.expanded = module.expanded.clone()  # torch itself cannot write to expanded memory
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["direct", "through the mapping", "custom IO"])
def test_every_kind_of_tensor_comes_back_as_plain_torch_would_load_it(path, dtype, way, monkeypatch):
    if way == "through the mapping":
        monkeypatch.delattr(os, "preadv", raising=False)  # as on Windows
    module = Odd()
    save(path, m=module)
    expected = odd_for_loading(dtype=dtype)
    expected.load_state_dict(torch.load(path)["m"])
    loaded = odd_for_loading(dtype=dtype)
    restore(MinimalIO() if way == "custom IO" else TorchCheckpointIO(), path, {"m": loaded})
    got, want = loaded.state_dict(), expected.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert (
            torch.equal(got[key].view(torch.uint8), want[key].view(torch.uint8))
            if key == "f8"
            else same(got[key], want[key])
        ), key
    assert loaded.tied is loaded.plain
    assert torch.equal(loaded.forgotten, odd_for_loading(dtype=dtype).forgotten)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_memory_layouts_may_differ_between_file_and_module(path, layout):
    change = {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for saved in change.values():
        values = saved(torch.randn(3, 4, 5, 6))
        module = nn.Module()
        module.w = nn.Parameter(change[layout](torch.zeros(3, 4, 5, 6)))
        torch.save({"m": {"w": values}}, path)
        stride = module.w.stride()
        restore(TorchCheckpointIO(), path, {"m": module})
        assert torch.equal(module.w, values)
        assert module.w.stride() == stride


def test_large_tensors_are_cast_in_pieces(path):
    values = torch.arange(2**23 + 5, dtype=torch.float32)
    torch.save({"m": {"w": values}}, path)
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(values.shape, dtype=torch.float64))
    restore(TorchCheckpointIO(), path, {"m": module})
    assert torch.equal(module.w, values.double())


def test_tied_live_tensors_with_different_saved_values_load_as_torch_does(path):
    save(path, m=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))
    results = []
    for load in (
        lambda m: m.load_state_dict(torch.load(path)["m"]),
        lambda m: restore(TorchCheckpointIO(), path, {"m": m}),
    ):
        tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        tied["b"].weight = tied["a"].weight
        load(tied)
        results.append(tied.state_dict())
    assert same(*results)


def test_views_of_one_storage_still_share_it_among_the_values_returned(io, path):
    base = torch.arange(10)
    torch.save({"base": base, "part": base[2:4], "nested": [base]}, path)
    rest = restore(io, path, {"nothing": 1}, strict=False)
    rest["base"][2] = -1
    assert rest["part"].tolist() == [-1, 3]
    assert rest["nested"][0][2] == -1


def test_parameters_and_their_flags_are_returned_as_they_were(io, path):
    torch.save({"p": nn.Parameter(torch.ones(2)), "f": nn.Parameter(torch.ones(2), False), "n": 1}, path)
    rest = restore(io, path, {"n": 0})
    assert type(rest["p"]) is nn.Parameter
    assert (rest["p"].requires_grad, rest["f"].requires_grad) == (True, False)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_single_object_takes_the_whole_file(io, path, new_format):
    module, optimizer = trained()
    other, its_optimizer = trained(seed=1)
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=new_format)
    assert restore(io, path, other) == {}
    torch.save(optimizer.state_dict(), path, _use_new_zipfile_serialization=new_format)
    assert restore(io, path, its_optimizer) == {}
    assert same(other.state_dict(), module.state_dict())
    assert same(its_optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_a_state_everything_is_returned(io, path, nothing):
    save(path, model=network(), epoch=1)
    assert same(dict(restore(io, path, nothing)["model"]), dict(network().state_dict()))


def test_a_state_of_another_type_is_refused(io, path):
    with pytest.raises(TypeError, match="dict, a module or an optimizer, got list"):
        restore(io, path, [network()])


@pytest.mark.parametrize("way", ["direct", "through the mapping"])
def test_nothing_loaded_depends_on_the_file_any_more(path, way, monkeypatch):
    if way == "through the mapping":
        monkeypatch.delattr(os, "preadv", raising=False)
    module, optimizer = trained()
    save(path, model=module, optimizer=optimizer, extra=torch.arange(1000), value=torch.arange(3))
    other = network(1)
    its_optimizer = torch.optim.AdamW(other.parameters())
    state = {"model": other, "optimizer": its_optimizer, "value": None}
    rest = restore(TorchCheckpointIO(), path, state)
    os.truncate(path, 0)
    assert same(its_optimizer.state_dict(), optimizer.state_dict())
    assert same(other.state_dict(), module.state_dict())
    assert rest["extra"].sum() == 499500
    assert state["value"].tolist() == [0, 1, 2]
    assert path.name not in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else True


def unchanged(*objects):
    """The states of objects, to compare with later."""
    return copy.deepcopy([o.state_dict() for o in objects])


def test_missing_names_are_all_listed_and_nothing_changes(io, path):
    save(path, model=network())
    module = network(1)
    before = unchanged(module)
    with pytest.raises(KeyError, match="no 'opt', 'epoch'; it has 'model'"):
        restore(io, path, {"model": module, "opt": 1, "epoch": 2})
    assert same(unchanged(module), before)


def test_not_strict_loads_what_both_have(io, path):
    saved = network().state_dict()
    saved["unknown"] = saved.pop("2.bias")
    torch.save({"model": saved}, path)
    module = network(1)
    bias = module[2].bias.clone()
    state = {"model": module, "epoch": 2}
    restore(io, path, state, strict=False)
    assert torch.equal(module[0].weight, network()[0].weight)
    assert torch.equal(module[2].bias, bias)
    assert state["epoch"] == 2


def test_keys_that_differ_are_all_listed_and_nothing_changes(io, path):
    saved = network().state_dict()
    saved["x"], saved["y"] = saved.pop("0.bias"), saved.pop("2.bias")
    first, module = network(2), network(1)
    torch.save({"first": first.state_dict(), "model": saved}, path)
    first = network(3)
    before = unchanged(first, module)
    with pytest.raises(CheckpointKeyError) as caught:
        restore(io, path, {"first": first, "model": module})
    assert "Missing in the checkpoint: 0.bias, 2.bias" in str(caught.value)
    assert "Unknown to the module: x, y" in str(caught.value)
    assert same(unchanged(first, module), before)


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ_are_an_error_and_nothing_changes(io, path, strict):
    save(path, model=nn.Linear(3, 4))
    module = nn.Linear(3, 5)
    before = unchanged(module)
    with pytest.raises(CheckpointError, match=r"weight is \(4, 3\) in the checkpoint and \(5, 3\) in the module"):
        restore(io, path, {"model": module}, strict=strict)
    assert same(unchanged(module), before)


def test_an_optimizer_that_does_not_fit_is_an_error_and_nothing_changes(io, path):
    module, optimizer = trained()
    save(path, model=module, optimizer=optimizer)
    other = network(1)
    its_optimizer = torch.optim.AdamW(list(other.parameters())[:2])
    before = unchanged(other, its_optimizer)
    with pytest.raises(CheckpointError, match=r"groups of \[6\] parameters, AdamW has \[2\]"):
        restore(io, path, {"model": other, "optimizer": its_optimizer})
    assert same(unchanged(other, its_optimizer), before)


def test_a_value_where_a_module_was_expected_is_an_error(io, path):
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="is a Tensor in the checkpoint, not the state of a module"):
        restore(io, path, {"model": network()})


class Renaming(nn.Module):
    """Loads checkpoints of its former self, and looks at its old values while it does."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.child = nn.Linear(1, 1)
        self.seen = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.seen = self.w.detach().clone()
        state_dict[prefix + "w"] = state_dict.pop(prefix + "old_name") * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_custom_loading_runs_on_untouched_values(io, path):
    torch.save({"m": {"old_name": torch.ones(3), "child.weight": torch.ones(1, 1), "child.bias": torch.ones(1)}}, path)
    module = Renaming()
    restore(io, path, {"m": module})
    assert module.seen.tolist() == [0, 0, 0]
    assert module.w.tolist() == [2, 2, 2]


def test_hooks_run(io, path):
    save(path, m=network(), o=torch.optim.SGD(network().parameters(), lr=3))
    module, calls = network(1), []
    optimizer = torch.optim.SGD(module.parameters(), lr=1)
    module[0].register_load_state_dict_pre_hook(lambda m, s, p, *args: s[p + "bias"].fill_(9))
    module.register_load_state_dict_post_hook(lambda m, keys: calls.append("module"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("optimizer"))
    restore(io, path, {"m": module, "o": optimizer})
    assert module[0].bias.tolist() == [9] * 4
    assert calls == ["module", "optimizer"]
    assert optimizer.param_groups[0]["lr"] == 3


def test_strategies_say_how_modules_are_loaded(io, path):
    save(path, m=network())
    wrapped = nn.Sequential(network(1))  # keys gain a prefix
    restore(
        io,
        path,
        {"m": wrapped},
        access=Access(
            load_module=lambda m, state, strict: m[0].load_state_dict(state, strict=strict),
            module_state=lambda m: m[0].state_dict(),
        ),
    )
    assert same(wrapped[0].state_dict(), network().state_dict())


def test_a_live_state_that_is_a_copy_still_works(io, path):
    save(path, m=network())
    wrapped = nn.Sequential(network(1))
    restore(
        io,
        path,
        {"m": wrapped},
        access=Access(
            load_module=lambda m, state, strict: m[0].load_state_dict(state, strict=strict),
            module_state=lambda m: copy.deepcopy(m[0].state_dict()),
        ),
    )
    assert same(wrapped[0].state_dict(), network().state_dict())


class Decrypting(TorchCheckpointIO):
    """Replaces loading only; opening must not go around it."""

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        content = super().load_checkpoint(path, map_location, weights_only)
        return {**content, "epoch": content["epoch"] + 100}


def test_a_subclass_that_replaces_loading_is_asked(path):
    save(path, epoch=1, model=network())
    state = {"epoch": 0, "model": network(1)}
    restore(Decrypting(), path, state)
    assert state["epoch"] == 101


def test_unsafe_content_needs_to_be_asked_for(path):
    torch.save({"path": Path("x"), "model": network().state_dict()}, path)
    state = {"path": None, "model": network(1)}
    with pytest.raises(CheckpointError, match="weights_only=False"):
        restore(TorchCheckpointIO(), path, state)
    restore(TorchCheckpointIO(), path, state, weights_only=False)
    assert state["path"] == Path("x")
    assert same(dict(state["model"].state_dict()), dict(network().state_dict()))


class Hiding:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.15 and newer
def test_tensors_inside_allowed_objects_do_not_depend_on_the_file(path):
    torch.save({"hidden": Hiding(torch.arange(5)), "sparse": torch.eye(3).to_sparse(), "n": 1}, path)
    with torch.serialization.safe_globals([Hiding]):
        rest = restore(TorchCheckpointIO(), path, {"n": 0})
    os.truncate(path, 0)
    assert rest["hidden"].tensor.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(rest["sparse"].to_dense(), torch.eye(3))


def test_a_file_from_a_machine_of_the_other_byte_order_loads(path, tmp_path):
    values = torch.arange(1000, dtype=torch.int32)
    torch.save({"m": {"w": values}}, tmp_path / "native")
    other_order = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "native") as native, zipfile.ZipFile(path, "w") as foreign:
        for name in native.namelist():
            data = native.read(name)
            data = other_order.encode() if name.endswith("/byteorder") else data
            data = array.array("i", data) if name.endswith("/data/0") else data
            if isinstance(data, array.array):
                data.byteswap()
            foreign.writestr(name, bytes(data))
    module = nn.Module()
    module.register_buffer("w", torch.zeros(1000, dtype=torch.int32))
    restore(TorchCheckpointIO(), path, {"m": module})
    assert torch.equal(module.w, values)


def test_a_checkpoint_of_lightning_fabric_loads():
    module = network(5)
    optimizer = torch.optim.AdamW(module.parameters())
    state = {"model": module, "optimizer": optimizer, "epoch": 0}
    rest = restore(TorchCheckpointIO(), DATA / "lightning-2.6.6.ckpt", state)
    assert state["epoch"] == 7
    assert optimizer.param_groups[0]["lr"] == 0.01
    module.train()
    torch.testing.assert_close(module(torch.eye(3)).detach(), rest["probe"])


def test_one_tensor_in_two_places_stays_one(io, path):
    tensor = torch.arange(3)
    torch.save({"list": [tensor, tensor], "n": 1}, path)
    first, second = restore(io, path, {"n": 0})["list"]
    assert first is second
    assert first.tolist() == [0, 1, 2]


def test_a_large_state_is_read_by_several_threads_to_the_same_result(path):
    module, rest = nn.Linear(2048, 2048), torch.randn(2048, 2048)
    parts = nn.ModuleList([module, nn.Linear(2048, 1024)])
    save(path, parts=parts, rest=rest, more=rest * 2)
    other = nn.ModuleList([nn.Linear(2048, 2048), nn.Linear(2048, 1024)])
    remainder = restore(TorchCheckpointIO(), path, {"parts": other})
    assert same(other.state_dict(), parts.state_dict())
    assert same(remainder, {"rest": rest, "more": rest * 2})
