import dataclasses
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch

from fabric_core.collections import (
    apply_to_collection,
    batch_mover,
    convert_tensors_to_scalars,
    convert_to_tensors,
    move_data_to_device,
)
from fabric_core.errors import InvalidArgumentError, InvalidTypeError

Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    image: Any
    label: Any = None


@dataclass(frozen=True)
class Frozen:
    value: Any


class Words(list):
    pass


class Strict(UserDict):
    pass


def double(x):
    return 2 * x


CONTAINERS = [
    [1, "a"],
    (1, "a"),
    {"k": 1, "l": "a"},
    OrderedDict(k=1, a="x"),
    Point(1, "a"),
    Words([1, "a"]),
    deque([1, "a"], maxlen=4),
    Strict(k=1),
    MappingProxyType({"k": 1}),
    Sample(1, "a"),
    torch.Size([1, 2]),
]


@pytest.mark.parametrize("data", CONTAINERS, ids=lambda data: type(data).__name__)
def test_containers_keep_their_type_and_the_original_its_content(data):
    before = repr(data)
    new = apply_to_collection(data, int, double)
    assert type(new) is type(data)
    assert repr(new) == before.replace("1", "2") if type(data) is not torch.Size else new == torch.Size([2, 4])
    assert repr(data) == before


def test_nesting_goes_to_any_depth():
    assert apply_to_collection({"a": [(1, {"b": 2})]}, int, double) == {"a": [(2, {"b": 4})]}


def test_arguments_reach_the_function():
    assert apply_to_collection([1], int, lambda x, y, z: (x, y, z), 2, z=3) == [(1, 2, 3)]


def test_wrong_dtypes_and_text_are_left_alone():
    assert apply_to_collection([1, True, "ab", b"1"], int, double, wrong_dtype=bool) == [2, True, "ab", b"1"]


def test_none_is_dropped_on_request():
    def drop(_):
        return None

    data = {"a": 1, "b": "x", "c": [1, "y"], "p": Point(1, "z"), "s": Sample(1)}
    new = apply_to_collection(data, int, drop, include_none=False)
    assert new == {"b": "x", "c": ["y"], "p": Point(1, "z"), "s": Sample(1)}
    assert apply_to_collection(data["c"], int, drop) == [None, "y"]
    assert apply_to_collection(defaultdict(int, a=1, b="x"), int, drop, include_none=False) == {"b": "x"}


def test_default_factories_and_attributes_of_subclasses_survive():
    factory = apply_to_collection(defaultdict(list, a=1), int, double)
    assert (factory["a"], factory["new"]) == (2, [])
    words = Words([1])
    words.language = "en"
    assert apply_to_collection(words, int, double).language == "en"
    assert apply_to_collection(Counter("aab"), int, double) == Counter(a=4, b=2)


def test_frozen_dataclasses_need_permission():
    with pytest.raises(InvalidArgumentError, match=r"'value' of the frozen dataclass Frozen.*allow_frozen=True"):
        apply_to_collection(Frozen(1), int, double)
    assert apply_to_collection(Frozen(1), int, double, allow_frozen=True) == Frozen(2)
    assert apply_to_collection(Frozen("x"), int, double) == Frozen("x")


def test_fields_that_the_constructor_does_not_take_are_visited():
    @dataclass
    class Derived:
        total: int = dataclasses.field(default=1, init=False)

    assert apply_to_collection(Derived(), int, double).total == 2


def test_a_container_that_cannot_be_rebuilt_says_what_to_do():
    class Pair(tuple):
        def __new__(cls, a, b):
            return super().__new__(cls, (a, b))

    with pytest.raises(InvalidTypeError, match=r"Pair.*`to\(device\)`"):
        apply_to_collection(Pair(1, 2), int, double)
    assert apply_to_collection(Pair("a", "b"), int, double) == ("a", "b")


def tree(device="cpu"):
    x = torch.zeros(2, device=device)
    nested = {
        "a": [x, 1],
        "b": (x, "t"),
        "c": Point(x, None),
        "d": Sample(x),
        "e": Frozen(x),
        "f": defaultdict(int, k=x),
    }
    return nested | {"g": Strict(k=x), "h": deque([x])}


def devices(data):
    found = []
    apply_to_collection(data, torch.Tensor, lambda t: found.append(t.device.type), allow_frozen=True)
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_in_place_comes_back_itself(device):
    batch = tree(device)
    assert move_data_to_device(batch, device) is batch
    for part in batch.values():
        assert move_data_to_device(part, device) is part


def test_a_batch_moves_whole_and_the_original_stays():
    batch = tree("cpu")
    new = move_data_to_device(batch, "meta")
    assert devices(new) == ["meta"] * 8
    assert devices(batch) == ["cpu"] * 8
    assert {key: type(value) for key, value in new.items()} == {key: type(value) for key, value in batch.items()}


def test_containers_without_anything_to_move_are_shared_not_copied():
    batch = {"stays": [torch.zeros(1, device="meta")], "moves": [torch.zeros(1)]}
    new = move_data_to_device(batch, "meta")
    assert new["stays"] is batch["stays"]
    assert new["moves"] is not batch["moves"]
    assert list(new) == ["stays", "moves"]


def test_whatever_has_a_to_moves_even_if_it_returns_nothing():
    class Graph:
        device = None

        def to(self, device):
            self.device = device

    graph, module = Graph(), torch.nn.Linear(1, 1)
    assert move_data_to_device([graph, module], "meta") == [graph, module]
    assert (graph.device, module.weight.device) == (torch.device("meta"),) * 2


def test_parameters_packed_sequences_and_classes_are_understood():
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2)])
    parameter = torch.nn.Parameter(torch.zeros(1))
    moved = move_data_to_device([packed, parameter, torch.Tensor], "meta")
    assert (type(moved[0]), moved[0].data.device.type, moved[1].device.type) == (type(packed), "meta", "meta")
    assert moved[2] is torch.Tensor
    assert move_data_to_device(parameter, "cpu") is parameter


def test_a_mover_is_made_once_per_device():
    assert batch_mover("cpu") is batch_mover(torch.device("cpu"))


def test_numbers_and_arrays_become_tensors():
    new = convert_to_tensors([True, 3, 0.5, numpy.ones(2, bool), numpy.float64(2), numpy.bool_(True), "x"], "cpu")
    dtypes = [torch.uint8, torch.int64, torch.float32, torch.bool, torch.float64, torch.uint8]
    assert [tensor.dtype for tensor in new[:-1]] == dtypes
    assert new[-1] == "x"
    assert convert_to_tensors(3, "meta").device.type == "meta"


def test_tensors_become_contiguous_on_the_device():
    assert convert_to_tensors({"t": torch.zeros(2, 3).T}, "cpu")["t"].is_contiguous()


def test_tensors_of_one_element_become_numbers():
    assert convert_tensors_to_scalars({"a": torch.tensor([[2]]), "b": 3, "c": "x"}) == {"a": 2, "b": 3, "c": "x"}


def test_a_larger_tensor_is_an_error():
    with pytest.raises(InvalidArgumentError, match=r"shape \(2, 3\)"):
        convert_tensors_to_scalars(torch.zeros(2, 3))
