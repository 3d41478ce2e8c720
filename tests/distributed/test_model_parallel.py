"""ModelParallelStrategy: sizes, mesh, what the user's function may return, and who keeps gradients equal."""

import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

from distributed.small_model import Model, batches, both, needs_fsdp, tensor_parallel, whole
from fabric_core import Fabric
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.precision import FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from fabric_core.precision.sharded import ShardedGradScaler
from fabric_core.strategies import ModelParallelStrategy


def same(module, mesh):
    return module


def launched(function=same, *sizes, devices=2, **options):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=ModelParallelStrategy(function, *sizes), **options)
    fabric.launch()
    return fabric


def mesh_of(*sizes):
    devices = torch.distributed.get_world_size()
    strategy = ModelParallelStrategy(same, *sizes)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    try:
        strategy.device_mesh  # noqa: B018
    except RuntimeError as error:
        early = str(error)
    fabric.launch()
    mesh = strategy.device_mesh
    loader = fabric.setup_dataloaders(DataLoader(range(8), batch_size=1))
    return early, mesh.mesh_dim_names, tuple(mesh.shape), [int(x) for x in loader]


def test_by_default_all_processes_of_a_node_share_the_data(workers):
    early, names, shape, _ = workers(2).run(mesh_of)[0]
    assert "after fabric.launch()" in early
    assert names == ("data_parallel", "tensor_parallel")
    assert shape == (1, 2)


def test_each_data_parallel_group_takes_its_share(workers):
    seen = [data for *_, data in workers(4).run(mesh_of, 2, 2)]
    assert seen == [[0, 2, 4, 6], [0, 2, 4, 6], [1, 3, 5, 7], [1, 3, 5, 7]]
    assert [data for *_, data in workers(2).run(mesh_of, 2, 1)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def wrong_sizes(*sizes):
    try:
        launched(same, *sizes)
    except RuntimeError as error:
        return str(error)
    return None


def test_sizes_must_multiply_to_the_number_of_processes(workers):
    for message in workers(2).run(wrong_sizes, 2):
        assert 'data_parallel_size=2 (as passed) times tensor_parallel_size=2 ("auto") is 4, but there are 2' in message


@pytest.mark.parametrize("size", [0, -1, 1.5, "all", True])
def test_sizes_are_positive_numbers(size):
    with pytest.raises(InvalidArgumentError, match=r"tensor_parallel_size=.*expected \"auto\" or 1 or more"):
        ModelParallelStrategy(same, 1, size)


def test_the_function_must_be_one():
    with pytest.raises(InvalidTypeError, match="a function that takes the module and a device mesh"):
        ModelParallelStrategy(nn.Linear(1, 1).weight)


def test_the_kind_of_checkpoint_is_chosen_by_name():
    assert ModelParallelStrategy(same).state_dict_type == "sharded"
    assert ModelParallelStrategy(same, save_distributed_checkpoint=False).state_dict_type == "full"


def returns_nothing(module, mesh):
    tensor_parallel(module, mesh)


def wraps(module, mesh):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def refused(function):
    fabric = launched(function)
    try:
        fabric.setup(Model())
    except TypeError as error:
        return str(error)
    return None


def test_the_function_returns_a_module_without_the_older_fsdp(workers):
    for message in workers(2).run(refused, returns_nothing):
        assert "returned NoneType instead of the module. End it with: return module" in message
    for message in workers(2).run(refused, wraps):
        assert "cannot work with FullyShardedDataParallel, which wraps: the module itself" in message


def norms_only(module, mesh):
    for block in module.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    return module


def told(function, sizes, frozen=False):
    fabric = launched(function, *sizes)
    module = Model()
    if frozen:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("blocks" in name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric.setup(module)
    return [str(w.message) for w in caught]


@needs_fsdp
def test_parameters_that_would_drift_apart_are_pointed_out(workers):
    first, second = workers(2).run(told, norms_only, (2, 1))
    assert "between the 2 data-parallel groups" in first[0]
    assert "embedding.weight, norm.weight, norm.bias, head.weight" in first[0].replace("bias, embedding", "embedding")
    assert second == []
    assert workers(2).run(told, norms_only, (1, 2)) == [[], []]
    assert workers(2).run(told, norms_only, (2, 1), True) == [[], []]


def test_so_are_tensor_parallel_ones_without_data_parallelism(workers):
    first, *others = workers(4).run(told_four)
    assert "and 16 more" in first[0]
    assert others == [[], [], []]


def told_four():
    fabric = launched(tensor_parallel, 2, 2, devices=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric.setup(Model())
    return [str(w.message) for w in caught]


def copies(seed_by_rank):
    """Parameters on every rank of a mesh of both kinds, built in memory with different seeds."""
    fabric = launched(both, 2, 2, devices=4)
    torch.manual_seed(seed_by_rank * fabric.global_rank)
    model = fabric.setup(Model())
    local = [p.to_local().tolist() for p in model.parameters() if p.device_mesh.ndim == 1]
    return [whole(p).tolist() for p in model.parameters()], local


@needs_fsdp
def test_replicas_of_a_shard_are_equal_whatever_the_seeds(workers):
    equal = workers(4).run(copies, 0)
    different = workers(4).run(copies, 1)
    assert [full for full, _ in different] == [equal[0][0]] * 4
    assert different[0][1] == different[1][1]
    assert different[2][1] == different[3][1]


def unlike():
    """Only rank 0 builds the module in memory."""
    fabric = launched(tensor_parallel)
    with fabric.init_module(empty_init=fabric.global_rank > 0):
        module = Model()
    try:
        fabric.setup(module)
    except RuntimeError as error:
        return str(error)
    return None


def test_modules_that_are_not_alike_on_all_ranks_are_refused_on_all(workers):
    for message in workers(2).run(unlike):
        assert "not the same on all ranks" in message


PRECISIONS = {
    "32-true": Precision,
    "16-true": HalfPrecision,
    "bf16-true": HalfPrecision,
    "16-mixed": MixedPrecision,
    "bf16-mixed": MixedPrecision,
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_are_those_of_the_family(name):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(same), precision=name)
    assert type(fabric.strategy.precision) is PRECISIONS[name]
    assert fabric.strategy.precision.precision == name
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    assert isinstance(scaler, ShardedGradScaler) == (name == "16-mixed")


@pytest.mark.parametrize("name", ["64-true", "nf4"])
def test_other_precisions_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"'{name}' \(fabric-.*\) does not go with model_parallel .*take '32-true', '16-true'"
    ):
        Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(same), precision=name)


def adapted():
    """A precision made by the user: its scaler becomes one that all ranks agree with."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    strategy = ModelParallelStrategy(same, precision=MixedPrecision("16-mixed", scaler=scaler))
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    made = strategy.precision.scaler
    return type(made).__name__, made.state_dict()["scale"], made.get_growth_interval()


def test_a_precision_with_a_scaler_of_ones_own_is_adapted(workers):
    assert workers(2).run(adapted) == [("ShardedGradScaler", 8.0, 3)] * 2


def twice():
    """The strategy serves a second Fabric, and a second module."""
    strategy = ModelParallelStrategy(tensor_parallel)
    for _ in range(2):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        models = [fabric.setup(Model()) for _ in range(2)]
        outputs = [model(batches(1, 2)[0]).isfinite().all().item() for model in models]
    return outputs, FSDPPrecision().precision


def test_a_strategy_serves_several_fabrics_and_modules(workers):
    assert workers(2).run(twice) == [([True, True], "32-true")] * 2


class Shuffled(nn.Module):
    """Buffers whose values differ by their order only."""

    def __init__(self, order):
        super().__init__()
        self.register_buffer("integers", order)
        self.register_buffer("one_hot", torch.zeros(8192, dtype=torch.float64))
        self.one_hot[int(order[0]) * 128] = 1


def shuffled():
    fabric = launched()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(fabric.global_rank))
    model = fabric.setup_module(Shuffled(order))
    return model.integers.tolist(), int(model.one_hot.argmax())


def test_values_in_another_order_are_made_equal_too(workers):
    first, second = workers(2).run(shuffled)
    assert first == second


def time_limits():
    strategy = ModelParallelStrategy(same, 1, 2, timeout=timedelta(seconds=77))
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    backend = strategy.device_mesh["data_parallel"].get_group()._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


def test_groups_of_the_mesh_have_the_time_limit(workers):
    assert workers(2).run(time_limits) == [77, 77]
