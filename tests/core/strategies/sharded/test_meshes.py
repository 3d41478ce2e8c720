"""Which mesh a sharding strategy gets, alone where that is enough, and over real processes."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import ShardingStrategy

from core.strategies.sharded.blocks import needs_fsdp
from fabric_core.strategies.sharded.meshes import MeshRequest, World, check_engine, make_mesh, sharding_named

NAMES = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_goes_by_its_name_in_any_case_or_torchs_enum(name):
    assert sharding_named(name) is sharding_named(name.lower()) is sharding_named(ShardingStrategy[name])
    assert sharding_named(name).name == name


def test_all_of_torchs_strategies_are_known():
    assert {strategy.name for strategy in ShardingStrategy} == set(NAMES)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'HALF_SHARD' is not known: use 'FULL_SHARD', .*'HYBRID_SHARD'"):
        sharding_named("HALF_SHARD")
    with pytest.raises(TypeError, match=r"sharding_strategy=1 .int.: expected one of 'FULL_SHARD'"):
        sharding_named(1)


def test_mesh_and_group_exclude_each_other():
    with pytest.raises(ValueError, match=r"device_mesh and process_group"):
        MeshRequest((2, 2), "group")


def place(nodes=1, per_node=4, **kwargs):
    return World(kwargs.get("device", "cpu"), nodes, per_node, timedelta(seconds=50))


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("HYBRID_SHARD", (3, 2), r"\(3, 2\) is for 6 processes, but 4 are running \(1 x 4\)"),
        ("HYBRID_SHARD", (4,), "one axis, but sharding_strategy='HYBRID_SHARD' needs 2 axes.*how many copies"),
        ("FULL_SHARD", (2, 2), '2 axes.*needs one axis.*sharding_strategy="HYBRID_SHARD"'),
        ("NO_SHARD", (2, 2), "shards over 2 processes.*leave device_mesh"),
    ],
)
def test_sizes_fit_the_strategy_and_the_number_of_processes(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sharding_named(name), MeshRequest(sizes), place())


@pytest.mark.parametrize("sizes", [(2, "2"), (2, -2), (True, 4)])
def test_sizes_are_positive_integers(sizes):
    with pytest.raises(TypeError, match=r"expected positive integers"):
        make_mesh(sharding_named("HYBRID_SHARD"), MeshRequest(sizes), place())


def test_what_is_no_mesh_is_refused():
    with pytest.raises(TypeError, match=r"device_mesh=4 .int.: expected a DeviceMesh or a tuple"):
        make_mesh(sharding_named("HYBRID_SHARD"), MeshRequest(4), place())
    with pytest.raises(TypeError, match=r"process_group='world': expected a torch.distributed.ProcessGroup"):
        make_mesh(sharding_named("FULL_SHARD"), MeshRequest(None, "world"), place())


@pytest.mark.skipif(torch.__version__ >= "2.7", reason="this torch shards on CPU")
def test_an_old_torch_says_which_one_shards_on_cpu():
    with pytest.raises(RuntimeError, match=r"cannot shard models on CPU. Install torch 2\.7 or newer"):
        check_engine("cpu", 1)
    check_engine("meta", 2)


def shown(mesh):
    return mesh.mesh.tolist(), mesh.mesh_dim_names, mesh.get_coordinate()


def made(name, place, sizes=None, group=None):
    return shown(make_mesh(sharding_named(name), MeshRequest(sizes, group), place))


def make_all(cases):
    return [made(*case) for case in cases]


BOTH = ("replicate", "shard")


@needs_fsdp
def test_each_strategy_gets_its_mesh(workers):
    nodes = place(nodes=2, per_node=2)
    cases = {
        ("FULL_SHARD", nodes): ([0, 1, 2, 3], ("shard",), [1]),
        ("SHARD_GRAD_OP", nodes): ([0, 1, 2, 3], ("shard",), [1]),
        ("FULL_SHARD", nodes, (4,)): ([0, 1, 2, 3], ("shard",), [1]),
        ("NO_SHARD", nodes): ([[0], [1], [2], [3]], BOTH, [1, 0]),
        ("HYBRID_SHARD", nodes): ([[0, 1], [2, 3]], BOTH, [0, 1]),
        ("_HYBRID_SHARD_ZERO2", nodes): ([[0, 1], [2, 3]], BOTH, [0, 1]),
        ("HYBRID_SHARD", place(per_node=4)): ([[0, 1, 2, 3]], BOTH, [0, 1]),
        ("HYBRID_SHARD", place(per_node=4), (2, 2)): ([[0, 1], [2, 3]], BOTH, [0, 1]),
        ("HYBRID_SHARD", place(per_node=4), (4, 1)): ([[0], [1], [2], [3]], BOTH, [1, 0]),
    }
    expected = [(mesh, names, tuple(mine)) for mesh, names, mine in cases.values()]
    found = workers(4).run(make_all, list(cases), timeout=120.0)[1]
    assert [(mesh, names, tuple(mine)) for mesh, names, mine in found] == expected


def use_groups():
    """The mesh of a pair of groups, of one group, and what comes of a pair that is no grid."""
    world = place(per_node=4)
    rows = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    shard, replicate = rows[dist.get_rank() % 2], columns[dist.get_rank() // 2]
    mesh = make_mesh(sharding_named("HYBRID_SHARD"), MeshRequest(None, (shard, replicate)), world)
    assert mesh.get_group("shard") is shard
    assert mesh.get_group("replicate") is replicate
    whole = made("FULL_SHARD", world, None, dist.group.WORLD)
    errors = []
    for name, group in (("HYBRID_SHARD", (shard, shard)), ("FULL_SHARD", shard), ("HYBRID_SHARD", dist.group.WORLD)):
        with pytest.raises(ValueError, match=r"process_group") as error:
            made(name, world, None, group)
        errors.append(str(error.value))
    return shown(mesh)[0], whole[0], errors


@needs_fsdp
def test_groups_that_exist_become_a_mesh(workers):
    grid, whole, (no_grid, too_small, one_axis) = workers(4).run(use_groups, timeout=120.0)[3]
    assert grid == [[0, 2], [1, 3]]
    assert whole == [0, 1, 2, 3]
    assert "does not form a grid of 2 x 2" in no_grid
    assert "is for 2 processes, but 4 are running" in too_small
    assert "process_group of sizes (4,) has one axis, but" in one_axis
    assert "the pair of groups: to shard over" in one_axis


def use_meshes():
    """Meshes that the user made are used as they are; those without names get some, on the same groups."""
    two = place(per_node=2)
    named = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    kept = make_mesh(sharding_named("HYBRID_SHARD"), MeshRequest(named), two)
    bare = DeviceMesh("cpu", torch.arange(2).view(2, 1))
    completed = make_mesh(sharding_named("NO_SHARD"), MeshRequest(bare), two)
    with pytest.raises(ValueError, match=r"devices of type 'cpu', but this process uses 'meta'"):
        make_mesh(sharding_named("HYBRID_SHARD"), MeshRequest(named), place(per_node=2, device="meta"))
    return kept is named, completed.mesh_dim_names, completed.get_group(0) is bare.get_group(0)


@needs_fsdp
def test_a_mesh_that_exists_is_used(workers):
    assert workers(2).run(use_meshes) == [(True, BOTH, True)] * 2


def time_limits():
    mesh = make_mesh(sharding_named("HYBRID_SHARD"), MeshRequest((2, 1)), place(per_node=2))
    return mesh.get_group("shard")._get_backend(torch.device("cpu")).options._timeout


@needs_fsdp
def test_groups_of_the_mesh_have_the_strategys_time_limit(workers):
    assert workers(2).run(time_limits) == [timedelta(seconds=50)] * 2
