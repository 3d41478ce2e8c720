"""What is stored of a state, and what is refused before anything is written."""

import argparse
import collections
import datetime
import io
import pathlib
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from fabric_core import Fabric
from fabric_core.checkpoint.safe_types import check_readable
from fabric_core.checkpoint.state import check_keys, collect_state, move_state_into, validate_filter
from fabric_core.errors import CheckpointKeyError
from fabric_core.rank_zero import rank_zero_only


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_objects_become_their_state_and_plain_values_stay():
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1)
    plain = collect_state({"m": module, "o": optimizer, "c": Counter(), "epoch": 3, "nested": {"a": [1]}})
    assert plain["m"]["weight"].data_ptr() == module.weight.data_ptr(), "no copies"
    assert plain["o"] == optimizer.state_dict()
    assert plain["c"] == {"count": 0}
    assert (plain["epoch"], plain["nested"]) == (3, {"a": [1]})


def test_strategies_say_how_the_state_of_modules_and_optimizers_is_taken():
    module = torch.nn.Linear(2, 1)
    state = {"m": module, "o": torch.optim.SGD(module.parameters(), lr=1)}
    plain = collect_state(state, module_state=lambda m: {"m": 1}, optimizer_state=lambda o: {"o": 1})
    assert plain == {"m": {"m": 1}, "o": {"o": 1}}


def test_a_filter_chooses_entries_of_dicts_and_nothing_else():
    state = {"m": torch.nn.Linear(2, 1), "d": {"a": 1, "b": 2}, "n": 5}
    plain = collect_state(state, {"m": lambda k, v: k == "bias", "d": lambda k, v: v > 1, "n": lambda k, v: False})
    assert list(plain["m"]) == ["bias"]
    assert plain["m"]._metadata is not None, "the version numbers of modules survive"
    assert (plain["d"], plain["n"]) == ({"b": 2}, 5)


def test_filters_that_cannot_work_are_refused():
    with pytest.raises(TypeError, match="must be a dict"):
        validate_filter({"a": 1}, lambda k, v: True)
    with pytest.raises(ValueError, match="names 'b', but the state only has 'a'"):
        validate_filter({"a": 1}, {"b": lambda k, v: True})
    with pytest.raises(TypeError, match=r"filter\['a'\] must be a function"):
        collect_state({"a": 1}, {"a": True})


def test_a_state_that_is_no_dict_is_refused():
    with pytest.raises(TypeError, match="must be a dict"):
        collect_state(torch.nn.Linear(1, 1))


def test_a_plain_data_loader_is_refused_by_name():
    with pytest.raises(TypeError, match=r"state\['train'\] is a DataLoader without state_dict"):
        collect_state({"epoch": 1, "train": DataLoader([1, 2])})


def test_a_module_in_a_nested_container_is_refused():
    with pytest.raises(TypeError, match=r"state\['nets'\]\[1\] is a Linear inside another container"):
        collect_state({"nets": [1, torch.nn.Linear(1, 1)]})


def test_a_class_is_not_taken_for_an_object_with_state():
    with pytest.warns(UserWarning, match=r"state\['kind'\] is a builtins\.type"):
        collect_state({"kind": Counter})


def test_what_safe_loading_will_refuse_is_named_when_saving():
    with pytest.warns(UserWarning, match=r"state\['args'\] is a argparse\.Namespace.*add_safe_globals"):
        collect_state({"args": argparse.Namespace(lr=1)})
    with torch.serialization.safe_globals([argparse.Namespace]):  # warnings are errors here
        collect_state({"args": argparse.Namespace(lr=1)})


VALUES = {
    "none": None,
    "int": 10**30,
    "float": float("inf"),
    "complex": 1j,
    "text": "x",
    "bytes": b"x",
    "bytearray": bytearray(b"x"),
    "bool": True,
    "list": [1, [2]],
    "tuple": (1, (2,)),
    "set": {1},
    "frozenset": frozenset({1}),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "defaultdict": collections.defaultdict(list),
    "deque": collections.deque([1]),
    "odd keys": {1: 2, (3, 4): 5, None: 6},
    "path as key": {pathlib.PurePosixPath("x"): 1},
    "path": pathlib.PurePosixPath("x"),
    "size": torch.Size([1]),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "parameter": torch.nn.Parameter(torch.ones(1)),
    "sparse": torch.eye(2).to_sparse(),
    "conjugated": torch.ones(2, dtype=torch.cfloat).conj(),
    "meta": torch.ones(2, device="meta"),
    "storage": torch.ones(2).untyped_storage(),
    "function": len,
    "class": int,
    "slice": slice(1),
    "namespace": argparse.Namespace(),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_warning_agrees_with_what_torch_really_refuses(name):
    file = io.BytesIO()
    torch.save({"v": VALUES[name]}, file)
    file.seek(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_readable({"v": VALUES[name]})
    warned = any("refused by safe loading" in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.load(file, weights_only=True)
        except Exception:
            assert warned
        else:
            assert not warned


def test_every_missing_key_is_named_with_what_there_is():
    with pytest.raises(KeyError) as caught:
        check_keys(["model", "optimiser", "epoch"], ["epoch", "optimizer"])
    assert isinstance(caught.value, CheckpointKeyError)
    text = str(caught.value)
    assert "no 'model', 'optimiser'; it has 'epoch', 'optimizer'" in text
    assert "Did you mean 'optimizer' for 'optimiser'?" in text
    assert "strict=False" in text


def test_missing_keys_are_fine_if_not_strict():
    check_keys(["a"], [], strict=False)
    check_keys(["a"], ["a", "b"])


def test_moving_state_loads_objects_and_replaces_values():
    source, destination = {"c": {"count": 4}, "n": 2, "rest": 1}, {"c": Counter(), "n": 0}
    move_state_into(source, destination, ["c", "n"])
    assert (destination["c"].count, destination["n"], source) == (4, 2, {"rest": 1})


def test_the_warning_names_the_users_line(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.warns(UserWarning, match="refused by safe loading") as record:
        fabric.save(tmp_path / "x.ckpt", {"when": datetime.date(2026, 1, 1)})
    assert record[0].filename == __file__


def test_one_rank_warns_for_all(recwarn):
    rank_zero_only.rank = 1
    check_readable({"when": datetime.date(2026, 1, 1)})
    assert not recwarn
