"""Saving and loading models that are spread over processes: what is written, what comes back, what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distributed.sharded_network import launched, message, network, same, set_up, states, train, whole
from distributed.small_model import needs_fsdp
from fabric_core import Fabric

pytestmark = needs_fsdp

# What comes back


def round_trip(path, form, background):
    fabric = launched(form, **({"checkpoint_io": "async"} if background else {}))
    model, optimizer = set_up(fabric, steps=2)
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2, "more": {"a": torch.arange(3)}})
    expected = states(model, optimizer)
    train(fabric, model, optimizer, 1)  # a save in the background must not see it
    state = dict(zip(("model", "optimizer"), set_up(fabric, seed=1), strict=True)) | {"step": 0}
    memory = [p.to_local().data_ptr() for p in state["model"].parameters()]
    rest = fabric.load(path, state)
    assert same(states(state["model"], state["optimizer"]), expected)
    assert memory == [p.to_local().data_ptr() for p in state["model"].parameters()]
    assert state["step"] == 2
    assert same(rest, {"more": {"a": torch.arange(3)}})
    return path.is_dir()


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_everything_comes_back_into_the_memory_that_was_there(form, background, tmp_path, workers):
    assert workers(2).run(round_trip, tmp_path / "x", form, background) == [form == "sharded"] * 2


KINDS = {"SGD": {"momentum": 0.9}, "Adagrad": {}, "NAdam": {}, "RMSprop": {}}


def every_optimizer(folder):
    for kind, options in KINDS.items():
        for form in ("full", "sharded"):
            fabric = launched(form)
            model, optimizer = set_up(fabric, steps=2, kind=getattr(torch.optim, kind), **options)
            fabric.save(folder / kind / form, {"model": model, "optimizer": optimizer})
            other, its_optimizer = set_up(fabric, seed=1, kind=getattr(torch.optim, kind), **options)
            fabric.load(folder / kind / form, {"model": other, "optimizer": its_optimizer})
            assert same(states(its_optimizer), states(optimizer)), kind
            placements = [
                {key: getattr(value, "placements", None) for key, value in state.items()}
                for which in (its_optimizer, optimizer)
                for state in which.optimizer.state.values()
            ]
            assert placements[: len(placements) // 2] == placements[len(placements) // 2 :], kind
            train(fabric, other, its_optimizer, 1)


def test_optimizer_state_is_made_as_the_optimizer_would_make_it(tmp_path, workers):
    workers(2).run(every_optimizer, tmp_path)


def without_optimizer_state(path):
    fabric = launched()
    model, optimizer = set_up(fabric, steps=2, kind=torch.optim.SGD)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    expected = states(model, optimizer)
    assert expected[1]["state"] == {}
    for loading in (fabric, launched(strategy="ddp")):
        other, its_optimizer = set_up(loading, seed=1, kind=torch.optim.SGD, lr=7.0)
        loading.load(path, {"model": other, "optimizer": its_optimizer}, strict=True)
        its_module = getattr(other.module, "module", other.module)
        assert same(states(its_module, its_optimizer), expected)
    return expected


def test_an_optimizer_that_has_no_state_comes_back_without_one(tmp_path, workers):
    expected = workers(2).run(without_optimizer_state, tmp_path / "x")[0]
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(fabric, seed=1, kind=torch.optim.SGD, lr=7.0)
    fabric.load(tmp_path / "x", {"model": model, "optimizer": optimizer}, strict=True)
    assert same(states(model, optimizer), expected)


class Average:
    """A user's object that holds tensors as the model's parameters are."""

    def __init__(self, model):
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state_dict(self):
        return {"tensors": self.tensors}

    def load_state_dict(self, state):
        for name, value in state["tensors"].items():
            self.tensors[name].copy_(value)


def sharded_values(folder):
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, _ = set_up(fabric)
        average, values = Average(model), [p.detach() * 2 for p in model.parameters()]
        fabric.save(folder / form, {"model": model, "average": average, "values": values})
        other, _ = set_up(fabric, seed=1)
        state = {"model": other, "average": Average(other), "values": [p.detach() for p in other.parameters()]}
        fabric.load(folder / form, state)
        assert same(whole(state["average"].tensors), whole(average.tensors))
        assert same(whole(state["values"]), whole(values))
        assert all(isinstance(value, DTensor) for value in state["values"])


def test_sharded_tensors_outside_of_modules_come_back_sharded(tmp_path, workers):
    workers(2).run(sharded_values, tmp_path)


def without_a_state(folder):
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, optimizer = set_up(fabric, steps=1)
        fabric.save(folder / form, {"model": model, "optimizer": optimizer, "step": 1})
        content = fabric.load(folder / form)
        assert same(dict(content["model"]), whole(dict(model.state_dict())))
        assert content["optimizer"]["state"]["0.weight"]["exp_avg"].shape == (5, 3)
        assert content["step"] == 1
    return sorted(content["optimizer"]["param_groups"][0]["params"])


def test_without_a_state_everything_comes_as_plain_tensors(tmp_path, workers):
    names = workers(2).run(without_a_state, tmp_path)[0]
    assert names == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]
    single = Fabric(accelerator="cpu", devices=1).load(tmp_path / "sharded")
    assert single["model"]["0.weight"].shape == (5, 3)


class Renaming(nn.Module):
    """Loads checkpoints of its former self."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 2))
        self.register_buffer("b", torch.zeros(2))
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x @ self.w + self.b)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "w"] = state_dict.pop(prefix + "old") * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


def custom_loading(path):
    torch.save(
        {"m": {"old": torch.ones(3, 2), "b": torch.ones(2), **nn.Linear(2, 2).state_dict(prefix="linear.")}}, path
    )
    fabric = launched()
    model = fabric.setup(Renaming())
    fabric.load(path, {"m": model})
    return model.w.full_tensor().tolist(), model.b.tolist()


def test_a_modules_own_loading_code_works_on_whole_tensors(tmp_path, workers):
    assert workers(2).run(custom_loading, tmp_path / "x") == [([[2.0, 2.0]] * 3, [1.0, 1.0])] * 2


# What is written


def replacing(path):
    fabric, full = launched("sharded"), launched("full")
    model, _ = set_up(fabric)
    kinds = []
    for saving in (fabric, full, full, fabric, fabric):
        saving.save(path, {"model": model})
        fabric.barrier()
        kinds.append(path.is_dir())
    (path.parent / "plain").mkdir(exist_ok=True)
    (path.parent / "plain" / "note").write_text("mine")
    refused = [message(f.save, path.parent / "plain", {"model": model}) for f in (fabric, full)]
    return kinds, sorted(p.name for p in path.parent.iterdir()), refused


def test_each_form_replaces_the_other_and_no_other_folder(tmp_path, workers):
    for kinds, names, refused in workers(2).run(replacing, tmp_path / "x"):
        assert kinds == [True, False, False, True, True]
        assert names == ["plain", "x"]
        assert all("IsADirectoryError" in text or "CheckpointError" in text for text in refused)
    assert (tmp_path / "plain" / "note").read_text() == "mine"


def parts(folder):
    written = {}
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, _ = set_up(fabric)
        empty = nn.Identity()
        keep = {"model": lambda key, value: key.startswith("0.")}
        fabric.save(folder / form, {"model": model, "empty": empty, "step": 1}, filter=keep)
        other, _ = set_up(fabric, seed=1)
        state = {"model": other, "empty": empty}
        assert fabric.load(folder / form, state, strict=False) == {"step": 1}
        assert same(whole(dict(other.state_dict()))["0.weight"], whole(dict(model.state_dict()))["0.weight"])
        written[form] = sorted(fabric.load(folder / form)["model"])
        text = message(fabric.load, folder / form, state)
        assert "Missing in the checkpoint: 1.weight, 1.bias, 1.running_mean, 1.running_var, 2.weight, 2.bias" in text
    return written


def test_filters_and_modules_without_state(tmp_path, workers):
    assert workers(2).run(parts, tmp_path) == [{key: ["0.bias", "0.weight"] for key in ("full", "sharded")}] * 2


def different_buffers(folder):
    found = []
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, _ = set_up(fabric)
        for buffer in model.buffers():
            buffer.fill_(fabric.global_rank + 3)
        fabric.save(folder / form, {"model": model})
        other, _ = set_up(fabric, seed=1)
        fabric.load(folder / form, {"model": other})
        found.append({name: buffer.unique().tolist() for name, buffer in other.named_buffers()})
    return found


def test_buffers_are_those_of_rank_zero(tmp_path, workers):
    wanted = {"1.running_mean": [3], "1.running_var": [3], "1.num_batches_tracked": [3]}
    assert workers(2).run(different_buffers, tmp_path) == [[wanted] * 2] * 2


def generator_and_discriminator(folder):
    for form in ("full", "sharded"):
        fabric = launched(form)
        one, its_own = set_up(fabric, steps=1)
        two = fabric.setup_module(network(1))
        both = fabric.setup_optimizers(torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, momentum=0.9))
        fabric.backward(two(one(torch.ones(4, 3))).sum())
        both.step()
        fabric.save(folder / form, {"one": one, "two": two, "its_own": its_own, "both": both})
        expected = states(one, two, its_own, both)
        content = fabric.load(folder / form)
        assert "one.0.weight" in content["both"]["state"]
        assert "0.weight" in content["its_own"]["state"]
        both.optimizer.state.clear()
        with torch.no_grad():
            next(iter(one.parameters())).zero_()
        fabric.load(folder / form, {"one": one, "two": two, "its_own": its_own, "both": both})
        assert same(states(one, two, its_own, both), expected)


def test_several_modules_and_optimizers_fit_in_one_checkpoint(tmp_path, workers):
    workers(2).run(generator_and_discriminator, tmp_path)


# What is refused


def refusals(folder):
    fabric = launched()
    model, optimizer = set_up(fabric, steps=1)
    inner = {"model": model._forward_module, "optimizer": optimizer.optimizer}
    texts = {
        "options": message(fabric.strategy.save_checkpoint, folder / "x", inner, storage_options={"a": 1}),
        "nameless": message(fabric.save, folder / "x", {"optimizer": optimizer}),
        "loader": message(fabric.save, folder / "x", {"model": model, "data": torch.utils.data.DataLoader([1])}),
    }
    return texts, (folder / "x").exists()


def test_what_cannot_be_saved_says_so_and_leaves_nothing(tmp_path, workers):
    for texts, exists in workers(2).run(refusals, tmp_path):
        assert texts["options"].startswith(
            "InvalidTypeError: FSDPStrategy has no storage options for sharded checkpoints"
        )
        assert "of its 6 parameters are in no module of the state, which has no module" in texts["nameless"]
        assert "DataLoader" in texts["loader"]
        assert not exists


def only_rank_one_fails(folder):
    texts = []
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, optimizer = set_up(fabric, steps=1)
        odd = {"data": torch.utils.data.DataLoader([1])} if fabric.global_rank == 1 else {"data": 1}
        texts.append(message(fabric.save, folder / form, {"model": model, **odd}))
        assert not (folder / form).exists()
        fabric.save(folder / form, {"model": model, "optimizer": optimizer, "step": 1})
        other, its_optimizer = set_up(fabric, seed=1)
        before = states(other, its_optimizer)
        odd = {"absent": 0} if fabric.global_rank == 1 else {}
        texts.append(message(fabric.load, folder / form, {"model": other, "optimizer": its_optimizer, **odd}))
        assert same(states(other, its_optimizer), before)
        fabric.load(folder / form, {"model": other, "optimizer": its_optimizer})
    return texts


def test_if_one_rank_cannot_none_does(tmp_path, workers):
    first, second = workers(2).run(only_rank_one_fails, tmp_path)
    assert all("because rank 1 cannot: InvalidTypeError: " in text for text in first[::2])
    assert all(
        "because rank 1 cannot: CheckpointKeyError: The checkpoint has no 'absent'" in text for text in first[1::2]
    )
    assert all(text.startswith("InvalidTypeError") for text in second[::2])
    assert all(text.startswith("CheckpointKeyError") for text in second[1::2])


def mismatches(folder):
    texts = []
    for form in ("full", "sharded"):
        fabric = launched(form)
        model, optimizer = set_up(fabric, steps=1)
        fabric.save(folder / form, {"model": model, "optimizer": optimizer})
        wide = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(3, 3))
        wide, its_optimizer = fabric.setup(wide, torch.optim.AdamW(wide.parameters()))
        before = states(wide, its_optimizer)
        texts.append(message(fabric.load, folder / form, {"model": wide, "optimizer": its_optimizer}))
        assert same(states(wide, its_optimizer), before)
    return texts


def test_all_that_does_not_fit_is_listed_and_nothing_changes(tmp_path, workers):
    for texts in workers(2).run(mismatches, tmp_path):
        for text in texts:
            assert "0.weight is (5, 3) in the checkpoint and (6, 3) in the module" in text
            assert "2.weight is (3, 5) in the checkpoint and (3, 6) in the module" in text
            assert "Missing in the checkpoint: 3.weight, 3.bias" in text


# One object


def one_object(folder):
    fabric, texts = launched(), []
    model, optimizer = set_up(fabric, steps=1)
    fabric.save(folder / "named", {"model": model, "optimizer": optimizer})
    fabric.save(folder / "two", {"a": model, "b": fabric.setup_module(network(2))})
    if fabric.is_global_zero:
        torch.save(network(3).state_dict(), folder / "bare")
        torch.save({"note": Path("x"), **network(3).state_dict()}, folder / "unsafe")
    fabric.barrier()
    other, its_optimizer = set_up(fabric, seed=1)
    fabric.load_raw(folder / "named", other)
    fabric.load_raw(folder / "named", its_optimizer)
    assert same(states(other, its_optimizer), states(model, optimizer))
    fabric.load_raw(folder / "bare", other)
    assert same(states(other), [dict(network(3).state_dict())])
    texts.append(message(fabric.load_raw, folder / "two", other))
    texts.append(message(fabric.load_raw, folder / "unsafe", other, strict=False))
    fabric.load_raw(folder / "unsafe", other, strict=False, weights_only=False)
    return texts


def test_load_raw_takes_a_bare_state_or_the_only_one_that_fits(tmp_path, workers):
    for ambiguous, unsafe in workers(2).run(one_object, tmp_path):
        assert "holds 'a', 'b', and which of it is meant for" in ambiguous
        assert "weights_only=False" in unsafe
    single = network(1)
    Fabric(accelerator="cpu", devices=1).load_raw(tmp_path / "named", single)
    assert single[0].weight.shape == (5, 3)


def round_trip_of_one_rank():
    """Rank 0 alone asks for the optimizer's state and gives it back; then all train on."""
    fabric = launched()
    model, optimizer = set_up(fabric, steps=1)
    if fabric.is_global_zero:
        optimizer.load_state_dict(optimizer.state_dict())
    fabric.barrier()
    fabric.backward(model(torch.ones(2, 3)).sum())
    optimizer.step()
    return all(isinstance(entries["exp_avg"], DTensor) for entries in optimizer.state_dict()["state"].values())


def test_reading_an_optimizers_state_is_for_each_rank_alone(workers):
    assert workers(2).run(round_trip_of_one_rank) == [True, True]
