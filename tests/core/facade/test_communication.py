"""Collectives: what one process gives back, and how nested values travel through a strategy of several devices."""

from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fabric_core import Fabric

Pair = namedtuple("Pair", "left right")


@pytest.fixture
def one():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def four(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=4)
    fabric.launch()
    return fabric


def test_with_one_process_shapes_stay(one):
    assert one.all_gather(torch.ones(2, 3)).shape == (2, 3)
    assert one.all_reduce(torch.ones(2, 3)).shape == (2, 3)
    assert one.all_gather(1.5).shape == ()


def test_with_one_process_nothing_changes(one):
    data = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3)]}
    assert one.all_reduce(data, reduce_op="sum")["a"].tolist() == [1.0, 2.0]
    assert one.all_gather(data)["b"][0].item() == 3
    assert one.broadcast(data, src=0) is data


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, torch.uint8),
        (3, torch.int64),
        (2.5, torch.float32),
        (np.float64(2.5), torch.float64),
        (np.array([1, 2], dtype=np.int32), torch.int32),
        (np.array(2.5, dtype=np.float16), torch.float16),
    ],
)
def test_numbers_and_arrays_become_tensors(one, value, dtype):
    for collective in (one.all_gather, one.all_reduce):
        result = collective(value)
        assert isinstance(result, torch.Tensor)
        assert result.dtype == dtype


def test_texts_and_nothing_stay_what_they_are(one):
    assert one.all_gather({"name": "a", "nothing": None, "n": 1})["name"] == "a"
    assert one.all_reduce(["a", None]) == ["a", None]


def test_gathered_values_lead_with_the_world(four):
    assert four.all_gather(torch.zeros(2, 3)).shape == (4, 2, 3)
    assert four.all_gather(torch.tensor(1.0)).shape == (4,)
    assert four.all_gather(5).tolist() == [5] * 4
    assert four.all_gather(torch.zeros(2, 0)).shape == (4, 2, 0)


def test_gathering_keeps_the_containers(four):
    data = {"a": [torch.ones(2), 1], "b": Pair(np.ones(3), (2.0, "text"))}
    result = four.all_gather(data)
    assert type(result["b"]) is Pair
    assert [t.shape for t in result["a"]] == [(4, 2), (4,)]
    assert result["b"].left.shape == (4, 3)
    assert result["b"].right[1] == "text"


def test_gathering_keeps_dtypes_apart(four):
    data = {str(d): torch.ones(2, dtype=d) for d in (torch.float32, torch.float64, torch.int64, torch.bool)}
    result = four.all_gather(data)
    assert {name: str(t.dtype) for name, t in result.items()} == {name: name for name in data}


def test_large_tensors_are_gathered_alone(four):
    data = [torch.ones(2), torch.ones((1 << 20) + 1), torch.full((3,), 2.0)]
    assert [t.shape for t in four.all_gather(data)] == [(4, 2), (4, (1 << 20) + 1), (4, 3)]


def test_the_gathered_collection_is_a_new_one(four):
    data = {"a": torch.ones(2)}
    four.all_gather(data)
    assert data["a"].shape == (2,)


def test_reducing_changes_the_callers_tensors(four):
    data = {"a": torch.ones(2), "b": [torch.ones(3)], "c": torch.ones(2, dtype=torch.int64)}
    result = four.all_reduce(data, reduce_op="sum")
    assert result["a"] is data["a"]
    assert result["b"][0] is data["b"][0]
    assert (data["a"].tolist(), data["c"].tolist()) == ([4.0, 4.0], [4, 4])


def test_reducing_changes_a_lone_tensor(four):
    tensor = torch.ones(2)
    assert four.all_reduce(tensor, reduce_op="sum") is tensor
    assert tensor.tolist() == [4.0, 4.0]


def test_reducing_changes_a_tensor_that_is_not_contiguous(four):
    tensor = torch.ones(2, 3).t()
    four.all_reduce(tensor, reduce_op="sum")
    assert tensor.tolist() == [[4.0, 4.0]] * 3


def test_the_mean_of_equal_values_is_the_value(four):
    assert four.all_reduce({"loss": 0.25, "n": 3}) == {"loss": torch.tensor(0.25), "n": torch.tensor(3)}


def test_empty_collections_travel_well(four):
    assert four.all_gather({}) == {}
    assert four.all_reduce([]) == []
    assert four.all_gather(None) is None


def test_the_group_and_the_operation_reach_the_strategy(fake_backend):
    from fabric_core.testing import FakeStrategy

    class Noting(FakeStrategy):
        def all_reduce(self, tensor, group=None, reduce_op="mean"):
            self.calls.append((group, reduce_op))
            return tensor

        def all_gather(self, tensor, group=None, sync_grads=False):
            self.calls.append((group, sync_grads))
            return super().all_gather(tensor)

    fabric = Fabric(accelerator="fake", strategy=Noting(), devices=2)
    fabric.launch()
    fabric.all_reduce([1.0, 2.0], group="g", reduce_op=dist.ReduceOp.MAX)
    fabric.all_gather(1.0, group="h", sync_grads=True)
    assert fabric.strategy.calls[-2:] == [("g", dist.ReduceOp.MAX), ("h", True)]


def test_small_tensors_of_one_dtype_travel_in_one_message(fake_backend):
    from fabric_core.testing import FakeStrategy

    class Counting(FakeStrategy):
        messages = 0

        def all_gather(self, tensor, group=None, sync_grads=False):
            self.messages += 1
            return super().all_gather(tensor)

    fabric = Fabric(accelerator="fake", strategy=Counting(), devices=2)
    fabric.launch()
    fabric.all_gather({str(i): torch.ones(64) for i in range(20)} | {"n": 1})
    assert fabric.strategy.messages == 2


def test_gradients_flow_back_through_gathered_values(four):
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    result = four.all_gather([a, b], sync_grads=True)
    (result[0].sum() + 2 * result[1].sum()).backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([4.0] * 2, [8.0] * 3)


def test_rank_zero_first_runs_the_body_and_needs_no_launch(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2)
    ran = []
    for local in (False, True):
        with fabric.rank_zero_first(local=local):
            ran.append(local)
    assert ran == [False, True]


def test_rank_zero_first_passes_errors_on(one):
    with pytest.raises(KeyError, match="body"), one.rank_zero_first():
        raise KeyError("body")
