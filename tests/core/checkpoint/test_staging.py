"""A copy in host memory: what it keeps, what it cuts off, and what memory it takes."""

import collections
import io

import numpy as np
import pytest
import torch
from torch import nn

from fabric_core.checkpoint.staging import HostBuffers, stage
from fabric_core.errors import CheckpointError

Point = collections.namedtuple("Point", "x y")


class Holder:
    def __init__(self, value):
        self.value = value


class Tagged(torch.Tensor):
    pass


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def trained():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(module.parameters(), amsgrad=True)
    module(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def saved(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


base = torch.arange(12.0)
TREES = {
    "a training state": trained(),
    "a parameter": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)],
    "one that needs gradients": torch.ones(2, requires_grad=True),
    "strides": base.view(3, 4).t(),
    "no elements": [torch.empty(0), torch.empty(0, 3), torch.tensor(1.0)],
    "views of one memory": [base[2:5], base.view(3, 4), base],
    "dtypes": [torch.ones(3, dtype=d) for d in (torch.bool, torch.int8, torch.bfloat16, torch.complex64)],
    "lazy conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.empty(3, device="meta"),
    "a storage": torch.ones(4).untyped_storage(),
    "a subclass": torch.ones(3).as_subclass(Tagged),
    "containers": collections.OrderedDict(
        list=[1, (2.5, "text")], set={3}, point=Point(1, 2), counter=collections.Counter(["one", "two"]), bytes=b"raw"
    ),
    "an array": np.arange(3),
    "dtype and device": [torch.float16, torch.device("cpu"), torch.Size([2])],
    "nothing": None,
}


@pytest.mark.parametrize("name", TREES)
def test_saving_the_copy_gives_the_file_that_saving_the_original_gives(name):
    assert saved(stage(TREES[name], HostBuffers())) == saved(TREES[name])


def test_no_later_change_reaches_the_copy():
    inner = Holder([torch.zeros(2), "a"])
    tree = {"tensor": torch.zeros(2), "list": [1], "object": inner, "array": np.zeros(2)}
    copy = stage(tree, HostBuffers())
    for tensor in (tree["tensor"], inner.value[0], tree["array"]):
        tensor[:] = 1
    tree["list"].append(2)
    inner.value.append("b")
    assert (copy["tensor"].tolist(), copy["list"], copy["array"].tolist()) == ([0, 0], [1], [0, 0])
    assert (copy["object"].value[0].tolist(), len(copy["object"].value)) == ([0, 0], 2)


def test_what_is_one_object_or_one_memory_stays_so():
    weight, shared = nn.Parameter(torch.ones(4)), [1]
    tree = {"a": weight, "b": weight, "view": weight.detach()[1:3], "inside": Holder(weight), "x": shared, "y": shared}
    copy = stage(tree, HostBuffers())
    assert copy["a"] is copy["b"] is copy["inside"].value
    assert address(copy["view"]) == address(copy["a"]) != address(weight)
    assert copy["x"] is copy["y"]


def test_a_modules_state_keeps_its_version_numbers():
    copy = stage({"model": nn.BatchNorm1d(2).state_dict()}, HostBuffers())
    assert copy["model"]._metadata[""] == {"version": 2}


def test_tensors_inside_other_tensors_take_the_same_memory_again():
    buffers, tensor = HostBuffers(), torch.eye(3).to_sparse()
    first = address(stage(tensor, buffers).values())
    assert address(stage(tensor, buffers).values()) == first


def test_the_second_copy_needs_no_memory():
    buffers, state = HostBuffers(), trained()
    first, second = (stage(state, buffers) for _ in range(2))
    for key, value in first["model"].items():
        assert address(second["model"][key]) == address(value)


def test_equally_large_tensors_have_memory_of_their_own():
    buffers = HostBuffers()
    for _ in range(2):
        copy = stage([torch.full((2,), float(i)) for i in range(3)], buffers)
        assert [tensor.tolist() for tensor in copy] == [[0, 0], [1, 1], [2, 2]]


def test_memory_that_the_next_copy_does_not_need_is_let_go():
    buffers = HostBuffers()
    stage([torch.ones(2), torch.ones(2), torch.ones(100)], buffers)
    stage([torch.ones(2)], buffers)
    assert {size: len(kept) for (size, _), kept in buffers._kept.items()} == {8: 1}


def test_what_cannot_be_pickled_is_refused_and_the_next_copy_works():
    buffers = HostBuffers()
    with pytest.raises(CheckpointError, match=r"cannot be copied.*Store plain values"):
        stage({"a": torch.ones(2), "f": lambda: 0}, buffers)
    assert stage(torch.ones(2), buffers).tolist() == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_for_tensors_of_a_device_is_page_locked_and_the_copy_is_complete():
    tensor, buffers = torch.zeros(2**24, device="cuda"), HostBuffers()
    for value in range(3):
        tensor.fill_(value)
        copy = stage({"a": tensor, "b": torch.ones(2)}, buffers)
        tensor.fill_(-1)
        assert copy["a"].is_pinned()
        assert copy["a"].unique().tolist() == [value]
        assert not copy["b"].is_pinned()
