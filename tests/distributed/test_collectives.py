"""Every collective between two real processes."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fabric_core import Fabric
from fabric_core.errors import WorkerFailedError


def launched(**arguments):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", **arguments)
    fabric.launch()
    return fabric


def ranks():
    fabric = launched()
    return fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size, fabric.is_global_zero


def test_each_process_knows_its_rank(workers):
    assert workers(2).run(ranks) == [(0, 0, 0, 2, True), (1, 1, 0, 2, False)]


def broadcast(src):
    fabric = launched()
    return fabric.broadcast({"from": fabric.global_rank, "data": [1, None, "text"]}, src=src)


@pytest.mark.parametrize("src", [0, 1])
def test_an_object_goes_from_one_rank_to_all(src, workers):
    assert workers(2).run(broadcast, src) == [{"from": src, "data": [1, None, "text"]}] * 2


def broadcast_tensor():
    fabric = launched()
    return fabric.broadcast(torch.full((2,), float(fabric.global_rank)), src=1).tolist()


def test_a_tensor_can_be_broadcast(workers):
    assert workers(2).run(broadcast_tensor) == [[1.0, 1.0]] * 2


def gather():
    fabric = launched()
    rank = fabric.global_rank
    data = {
        "vector": torch.tensor([rank, 10.0]),
        "scalar": torch.tensor(rank),
        "number": rank + 0.5,
        "flag": bool(rank),
        "array": np.full((2, 1), rank, dtype=np.int16),
        "deep": [(torch.full((1, 2), rank), "text")],
        "empty": torch.ones(0),
    }
    result = fabric.all_gather(data)
    shapes = {name: tuple(value.shape) for name, value in result.items() if name != "deep"}
    lists = {name: value.flatten().tolist() for name, value in result.items() if name != "deep"}
    return shapes, lists, result["deep"][0][0].tolist(), result["deep"][0][1], str(result["array"].dtype)


def test_nested_values_gather_with_the_world_first(workers):
    for shapes, lists, deep, text, dtype in workers(2).run(gather):
        assert shapes == {
            "vector": (2, 2),
            "scalar": (2,),
            "number": (2,),
            "flag": (2,),
            "array": (2, 2, 1),
            "empty": (2, 0),
        }
        assert (lists["vector"], lists["scalar"], lists["number"]) == ([0.0, 10.0, 1.0, 10.0], [0, 1], [0.5, 1.5])
        assert (lists["flag"], lists["array"]) == ([0, 1], [0, 0, 1, 1])
        assert (deep, text, dtype) == ([[[0, 0]], [[1, 1]]], "text", "torch.int16")


def gather_in(name):
    fabric = launched()
    dtype = getattr(torch, name)
    tensor = torch.tensor(fabric.global_rank).to(dtype)
    result = fabric.all_gather([tensor, torch.zeros(2, 3).to(dtype)])
    return str(result[0].dtype), result[0].float().tolist(), tuple(result[1].shape)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int16", "uint16", "float16", "bfloat16", "float64", "float8_e4m3fn"]
)
def test_every_dtype_can_be_gathered(dtype, workers):
    assert workers(2).run(gather_in, dtype) == [(f"torch.{dtype}", [0.0, 1.0], (2, 2, 3))] * 2


def gather_with_gradients():
    fabric = launched()
    rank = fabric.global_rank
    value = torch.full((2,), float(rank + 1), requires_grad=True)
    gathered = fabric.all_gather(value, sync_grads=True)
    (gathered[0] * 1 + gathered[1] * 10).sum().backward()
    plain = fabric.all_gather(value)
    return value.grad.tolist(), plain.requires_grad


def test_gradients_flow_back_through_a_gather_if_asked_for(workers):
    assert workers(2).run(gather_with_gradients) == [([2.0, 2.0], False), ([20.0, 20.0], False)]


def reduce(op):
    fabric = launched()
    rank = fabric.global_rank
    floats, integers = torch.tensor([rank + 1.0, 4.0]), torch.tensor([rank + 1, 4])
    fabric.all_reduce({"a": floats, "b": [integers]}, reduce_op=op)
    return floats.tolist(), integers.tolist()


OPERATIONS = {
    "mean": ([1.5, 4.0], [1, 4]),
    "avg": ([1.5, 4.0], [1, 4]),
    "MEAN": ([1.5, 4.0], [1, 4]),
    "sum": ([3.0, 8.0], [3, 8]),
    "min": ([1.0, 4.0], [1, 4]),
    "max": ([2.0, 4.0], [2, 4]),
    "product": ([2.0, 16.0], [2, 16]),
    None: ([1.5, 4.0], [1, 4]),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_values_reduce_in_place(op, workers):
    assert workers(2).run(reduce, op) == [OPERATIONS[op]] * 2


def reduce_with_native_operations():
    fabric = launched()
    rank, operations = float(fabric.global_rank), (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG)
    return [fabric.all_reduce(torch.tensor(rank), reduce_op=op).item() for op in operations]


def test_torchs_own_operations_are_understood(workers):
    assert workers(2).run(reduce_with_native_operations) == [[1.0, 1.0, 0.5]] * 2


def reduce_numbers():
    fabric = launched()
    rank = fabric.global_rank
    result = fabric.all_reduce([rank, float(rank), np.array([rank, 2.0])], reduce_op="mean")
    return [value.tolist() for value in result]


def test_numbers_and_arrays_reduce_to_tensors(workers):
    assert workers(2).run(reduce_numbers) == [[0, 0.5, [0.5, 2.0]]] * 2


def reduce_odd_layouts():
    fabric = launched()
    transposed = torch.full((2, 3), float(fabric.global_rank)).t()
    part = torch.full((4,), float(fabric.global_rank))
    leaf = torch.full((2,), float(fabric.global_rank), requires_grad=True)
    fabric.all_reduce(transposed, reduce_op="sum")
    fabric.all_reduce([part[::2]], reduce_op="sum")
    fabric.all_reduce(leaf, reduce_op="sum")
    return transposed.tolist(), part.tolist()[::2], leaf.tolist(), leaf.is_leaf


def test_views_and_leaves_reduce_in_place(workers):
    assert workers(2).run(reduce_odd_layouts) == [([[1.0, 1.0]] * 3, [1.0, 1.0], [1.0, 1.0], True)] * 2


def reduce_badly():
    launched().all_reduce(1.0, reduce_op="average")


def test_an_unknown_operation_lists_those_there_are(workers):
    with pytest.raises(WorkerFailedError, match=r"reduce_op='average' is unknown. Expected one of sum, mean"):
        workers(2).run(reduce_badly)


def in_a_group():
    fabric = launched()
    group = dist.new_group([1])
    if fabric.global_rank == 0:
        return None
    return fabric.all_gather(torch.ones(2), group=group).shape, fabric.all_reduce(3.0, group=group).item()


def test_collectives_take_a_group(workers):
    assert workers(2).run(in_a_group) == [None, ((1, 2), 3.0)]


def vote():
    strategy = launched().strategy
    mine = strategy.global_rank == 0
    return strategy.reduce_boolean_decision(mine), strategy.reduce_boolean_decision(mine, all=False)


def test_a_decision_counts_every_vote(workers):
    assert workers(2).run(vote) == [(False, True)] * 2


def print_on_each(path):
    import contextlib
    import io

    fabric, text = launched(), io.StringIO()
    with contextlib.redirect_stdout(text):
        fabric.print("hello")
    fabric.barrier("done")
    return text.getvalue()


def test_print_speaks_once_per_node(workers, tmp_path):
    assert workers(2).run(print_on_each, str(tmp_path)) == ["hello\n", ""]


def _reduce_bools(op):
    fabric = launched()
    return fabric.all_reduce(torch.tensor([True, fabric.global_rank == 0]), reduce_op=op).tolist()


def test_bool_tensors_reduce_to_all_and_any(workers):
    assert workers(2).run(_reduce_bools, "min") == [[True, False]] * 2
    assert workers(2).run(_reduce_bools, "max") == [[True, True]] * 2


def _join_as_another_size():
    launched()
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    environment = fabric.strategy.cluster_environment
    environment.world_size = lambda: 3
    with pytest.raises(RuntimeError) as caught:
        fabric.launch()
    return str(caught.value)


def test_a_group_of_another_size_is_refused(workers):
    assert "is to be rank 1 of 3 now" in workers(2).run(_join_as_another_size)[1]


def _one_device_in_each():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Fabric(accelerator="cpu", devices=1)
    return [str(warning.message) for warning in caught]


def test_processes_that_work_each_for_itself_are_warned_of(workers):
    assert "2 processes were started" in workers(2).run(_one_device_in_each)[0][0]
