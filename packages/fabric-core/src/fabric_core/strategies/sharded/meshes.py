"""Which processes share the parameters and which hold copies of them: the device mesh behind a sharding strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARD, REPLICATE = "shard", "replicate"
"""Names of the mesh's axes. Every rank along ``shard`` holds another part; along ``replicate`` they hold the same."""


@dataclass(frozen=True)
class Sharding:
    """What the name of a sharding strategy stands for.

    Attributes:
        name: as in ``torch.distributed.fsdp.ShardingStrategy``.
        axes: number of axes of its mesh: one to shard over, two to replicate and shard.
        reshard_after_forward: whether parameters are freed between forward and backward; ``None`` leaves it to
            ``fully_shard``, which frees all but those of the outermost module.
        whole: every rank holds everything; the axis to shard over has one process.
    """

    name: str
    axes: int = 1
    reshard_after_forward: bool | None = None
    whole: bool = False


_STRATEGIES: Final = {
    sharding.name: sharding
    for sharding in (
        Sharding("FULL_SHARD"),
        Sharding("SHARD_GRAD_OP", reshard_after_forward=False),
        Sharding("NO_SHARD", axes=2, reshard_after_forward=False, whole=True),
        Sharding("HYBRID_SHARD", axes=2),
        Sharding("_HYBRID_SHARD_ZERO2", axes=2, reshard_after_forward=False),
    )
}


def sharding_named(strategy: Any) -> Sharding:
    """What a name, upper or lower case, or a member of torch's enum ``ShardingStrategy`` stands for.

    Raises:
        ValueError: an unknown name; the message lists all.
        TypeError: neither text nor a member of the enum.
    """
    name = strategy if isinstance(strategy, str) else getattr(strategy, "name", None)
    known = [one for one in _STRATEGIES if not one.startswith("_")]
    if not isinstance(name, str):
        raise InvalidTypeError(
            f"sharding_strategy={strategy!r} ({type(strategy).__name__}): expected one of "
            f"{', '.join(map(repr, known))}, or a torch.distributed.fsdp.ShardingStrategy."
        )
    found = _STRATEGIES.get(name.strip().upper().replace("-", "_"))
    if found is None:
        raise InvalidArgumentError(f"sharding_strategy={name!r} is not known: use {', '.join(map(repr, known))}.")
    return found


@dataclass(frozen=True)
class MeshRequest:
    """What the user said about the mesh; at most one of the two is given.

    Attributes:
        device_mesh: a ``DeviceMesh``, or its sizes: ``(shard,)`` or ``(replicate, shard)``.
        process_group: the group to shard over, or the pair of those to shard and to replicate over.
    """

    device_mesh: DeviceMesh | tuple[int, ...] | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        if self.device_mesh is not None and self.process_group is not None:
            raise InvalidArgumentError(
                "device_mesh and process_group both say which processes share the parameters. Pass one of them."
            )


@dataclass(frozen=True)
class World:
    """Where the mesh is made.

    Attributes:
        device_type: as in ``torch.device(...).type``.
        num_nodes: number of nodes.
        per_node: processes on each node.
        timeout: how long a collective of a new group waits.
    """

    device_type: str
    num_nodes: int
    per_node: int
    timeout: timedelta

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return self.num_nodes * self.per_node


def make_mesh(sharding: Sharding, request: MeshRequest, world: World) -> DeviceMesh:
    """The mesh, with axes named ``shard``, or ``replicate`` and ``shard``. Every rank calls it, in the process group.

    Raises:
        ValueError: axes that do not fit the strategy, or sizes whose product is not the world size.
        TypeError: neither a mesh, sizes nor groups.
        RuntimeError: the installed torch cannot shard on this kind of device.
    """
    given = request.device_mesh
    if request.process_group is not None:
        mesh = _from_groups(request.process_group, sharding, world)
    elif given is None:
        mesh = new_mesh(_default_shape(sharding, world), world)
    elif isinstance(given, tuple | list):
        mesh = new_mesh(_checked_shape(tuple(given), sharding, world), world)
    else:
        mesh = _given_mesh(given, sharding, world)
    check_engine(world.device_type, mesh.ndim)
    return mesh


def check_engine(device_type: str, axes: int) -> None:
    """``RuntimeError`` if the installed torch's ``fully_shard`` does not run on this kind of device."""
    if device_type != "cpu":
        return
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise UsageError(
            f"torch {torch.__version__} cannot shard models on CPU. Install torch 2.7 or newer, use a device of "
            'another kind, or strategy="ddp".'
        )
    if axes > 1 and torch.__version__ < "2.8":
        raise UsageError(
            f"torch {torch.__version__} cannot average gradients over a second axis of the mesh on CPU, as NO_SHARD "
            "and HYBRID_SHARD need. Install torch 2.8 or newer, or use sharding_strategy='FULL_SHARD'."
        )


def _default_shape(sharding: Sharding, world: World) -> tuple[int, ...]:
    if sharding.whole:
        return (world.world_size, 1)
    return (world.world_size,) if sharding.axes == 1 else (world.num_nodes, world.per_node)


def _checked_shape(
    shape: tuple[Any, ...], sharding: Sharding, world: World, argument: str = "device_mesh"
) -> tuple[int, ...]:
    """``shape`` if it has the right number of axes for the strategy and covers the world."""
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape):
        raise InvalidTypeError(f"{argument}={shape!r}: expected positive integers, (replicate, shard).")
    if len(shape) != sharding.axes:
        raise InvalidArgumentError(
            f"{argument} of sizes {shape!r} has {_axes(len(shape))}, but sharding_strategy={sharding.name!r} needs "
            f"{_axes(sharding.axes)}. {_advice(sharding, argument)}"
        )
    if sharding.whole and shape[-1] != 1:
        raise InvalidArgumentError(
            f"{argument} of sizes {shape!r} shards over {shape[-1]} processes. {_advice(sharding, argument)}"
        )
    if math.prod(shape) != world.world_size:
        raise InvalidArgumentError(
            f"{argument} of sizes {shape!r} is for {math.prod(shape)} processes, but {world.world_size} are running "
            f"({world.num_nodes} x {world.per_node}). The sizes must multiply to the number of processes."
        )
    return shape


def _axes(count: int) -> str:
    return "one axis" if count == 1 else f"{count} axes"


def _advice(sharding: Sharding, argument: str) -> str:
    if sharding.whole:
        return f"NO_SHARD replicates over all processes: leave {argument} out."
    if sharding.axes == 1:
        return 'To replicate over the first axis and shard over the second, pass sharding_strategy="HYBRID_SHARD".'
    if argument == "process_group":
        return "Pass the pair of groups: to shard over, and to replicate over."
    return "Pass (replicate, shard): how many copies of the model, and over how many processes each is spread."


def new_mesh(shape: tuple[int, ...], world: World, axes: tuple[str, str] = (REPLICATE, SHARD)) -> DeviceMesh:
    """A mesh over all processes, of one axis (the second of ``axes``) or two. Every rank calls it.

    Its groups have the strategy's time limit, which torch's own mesh factory would not give them.
    """
    layout = torch.arange(world.world_size).view(shape)
    if len(shape) == 1:
        return _mesh(dist.group.WORLD, layout, world, axes)
    columns = _own_group([layout[:, column].tolist() for column in range(shape[1])], world)
    rows = _own_group([row.tolist() for row in layout], world)
    return _mesh([columns, rows], layout, world, axes)


def _own_group(members: list[list[int]], world: World) -> Any:
    """Make all groups, as every rank has to, and return the one that this process is in."""
    if len(members) == 1:
        return dist.group.WORLD
    groups = [dist.new_group(ranks, timeout=world.timeout) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)


def _mesh(groups: Any, layout: torch.Tensor, world: World, axes: tuple[str, str] = (REPLICATE, SHARD)) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(groups, list):
        return DeviceMesh.from_group(groups, world.device_type, mesh_dim_names=axes[1:])
    return DeviceMesh.from_group(groups, world.device_type, mesh=layout, mesh_dim_names=axes)


def _from_groups(groups: Any, sharding: Sharding, world: World) -> DeviceMesh:
    """A mesh of groups that exist: one, or the pair (shard, replicate)."""
    pair = isinstance(groups, tuple | list)
    given = list(groups) if pair else [groups]
    if not all(isinstance(group, dist.ProcessGroup) for group in given):
        raise InvalidTypeError(
            f"process_group={groups!r}: expected a torch.distributed.ProcessGroup, or the pair of the groups to shard "
            "and to replicate over."
        )
    shape = tuple(group.size() for group in reversed(given))
    _checked_shape(shape, sharding, world, "process_group")
    if len(given) == 1:
        return _mesh(given[0], torch.arange(world.world_size), world)
    shard, replicate = given
    mine = (dist.get_group_rank(replicate, dist.get_rank()), dist.get_group_rank(shard, dist.get_rank()))
    everybody: list[Any] = [None] * world.world_size
    dist.all_gather_object(everybody, mine)
    layout = torch.full(shape, -1)
    for rank, position in enumerate(everybody):
        layout[position] = rank
    if (layout < 0).any():
        raise InvalidArgumentError(
            f"process_group=(shard, replicate) does not form a grid of {shape[0]} x {shape[1]}: the ranks' places in "
            f"it are {everybody}. Each rank's two groups must have nobody but the rank itself in common."
        )
    return _mesh([replicate, shard], layout, world)


def _given_mesh(mesh: Any, sharding: Sharding, world: World) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise InvalidTypeError(
            f"device_mesh={mesh!r} ({type(mesh).__name__}): expected a DeviceMesh or a tuple of sizes, such as (2, 4)."
        )
    if mesh.device_type != world.device_type:
        raise InvalidArgumentError(
            f"device_mesh is for devices of type {mesh.device_type!r}, but this process uses {world.device_type!r}."
        )
    _checked_shape(tuple(mesh.mesh.shape), sharding, world)
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:  # fully_shard wants the names
        return _mesh([mesh.get_group(0), mesh.get_group(1)], mesh.mesh, world)
    return mesh
