"""Sharded data parallelism: every process holds a part of the parameters, their gradients and the optimizer's state."""

from __future__ import annotations

import sys
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.fsdp import ShardingStrategy

from fabric_core.distributed.group import DEFAULT_TIMEOUT
from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.strategies.sharded.activation_checkpointing import checkpoint_modules, read_checkpointing
from fabric_core.strategies.sharded.base import Compile, ShardedStrategy
from fabric_core.strategies.sharded.fsdp1_arguments import (
    ignored_places,
    read_cpu_offload,
    read_mixed_precision,
    read_options,
)
from fabric_core.strategies.sharded.groups import fsdp_modules
from fabric_core.strategies.sharded.meshes import MeshRequest, World, make_mesh, sharding_named
from fabric_core.strategies.sharded.splitting import Splitting, check_parts
from fabric_core.strategies.sharded.wrapping import Policy, check_policy, choose_units
from fabric_core.warnings import user_stacklevel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy

    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.precision import Precision
    from fabric_core.strategies.sharded.activation_checkpointing import SelectiveCheckpoint


class FSDPStrategy(ShardedStrategy):
    """``torch.distributed.fsdp.fully_shard`` in one process per device, on any kind of device.

    The module is cut into units. A unit's parameters are gathered just before it runs and freed after, and its
    gradients are averaged and cut up as soon as they are there. While it is set up, no more than one unit is whole.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this node.
        cluster_environment: who starts the processes.
        precision: the dtypes.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...
        timeout: how long a collective waits for the other ranks.
        cpu_offload: keep the parts in the CPU's memory, where the optimizer then runs. ``True``, or a ``CPUOffload`` or
            ``CPUOffloadPolicy`` of torch.
        mixed_precision: a ``MixedPrecision`` or ``MixedPrecisionPolicy`` of torch, in place of the precision's own.
        auto_wrap_policy: which modules are units: a set of classes, a function
            ``(module, recurse, nonwrapped_numel) -> bool``, or a policy object of ``torch.distributed.fsdp.wrap``. By
            default the blocks that repeat; an empty set makes one unit of everything.
        activation_checkpointing: deprecated; a class or a list of classes for the policy below.
        activation_checkpointing_policy: which modules run again in backward instead of keeping what they computed: as
            ``auto_wrap_policy``, or a ``SelectiveCheckpoint``, which keeps the results of some operations.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"``, which keeps parameters whole from forward to backward;
            ``"NO_SHARD"``, where every rank holds everything; ``"HYBRID_SHARD"``, which shards within a node and
            replicates over nodes, so that on one node nothing is replicated unless ``device_mesh`` says so. Or a member
            of torch's ``ShardingStrategy``.
        state_dict_type: ``"sharded"`` checkpoints are folders that all ranks write, ``"full"`` ones single files.
        device_mesh: for ``"HYBRID_SHARD"``: ``(replicate, shard)``, or a two-dimensional ``DeviceMesh`` with these
            axes; a one-dimensional one for the others.
        checkpoint_io: where full checkpoints go; ``"async"`` writes both kinds in the background.
        **kwargs: further arguments of ``FullyShardedDataParallel`` and of ``fully_shard``, as ``ShardOptions`` lists
            them. Unlike in torch, ``sync_module_states`` is on: all ranks start from rank 0's values.

    Raises:
        TypeError: an argument of a wrong type, or one that does not exist.
        ValueError: arguments that contradict each other, or cannot be honoured.
    """

    precision_family: ClassVar[str | None] = "fsdp"

    def __init__(  # noqa: PLR0913, PLR0917 - the arguments that users of FSDP know
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        cpu_offload: bool | CPUOffload | CPUOffloadPolicy | None = None,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
        auto_wrap_policy: Policy | None = None,
        activation_checkpointing: type[nn.Module] | list[type[nn.Module]] | None = None,
        activation_checkpointing_policy: Policy | SelectiveCheckpoint | None = None,
        sharding_strategy: str | ShardingStrategy = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "sharded",
        device_mesh: tuple[int, ...] | DeviceMesh | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        name = type(self).__name__
        self._options = read_options(name, kwargs)
        self._sharding = sharding_named(sharding_strategy)
        self._mesh_request = MeshRequest(device_mesh, self._options.process_group)
        self._mesh: DeviceMesh | None = None
        self.mixed_precision = _one_of("mixed_precision", mixed_precision, "mp_policy", self._options.mp_policy)
        self.cpu_offload = _one_of("cpu_offload", cpu_offload, "offload_policy", self._options.offload_policy)
        read_mixed_precision(self.mixed_precision)
        read_cpu_offload(self.cpu_offload, "cpu")
        check_policy("auto_wrap_policy", auto_wrap_policy)
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing_policy = read_checkpointing(
            activation_checkpointing, activation_checkpointing_policy
        )
        if state_dict_type not in ("full", "sharded"):
            raise InvalidArgumentError(f'{name}(state_dict_type={state_dict_type!r}): expected "full" or "sharded".')
        self.state_dict_type = state_dict_type

    @classmethod
    def with_cpu_offload(cls, **kwargs: Any) -> FSDPStrategy:
        """``"fsdp_cpu_offload"``: parameters, gradients and optimizer state stay in the CPU's memory between uses."""
        return cls(cpu_offload=True, **kwargs)

    @classmethod
    def hybrid(cls, **kwargs: Any) -> FSDPStrategy:
        """``"hsdp"``: sharded within each node, replicated over nodes.

        One node alone is one replica: there it does what ``"fsdp"`` does. Pass
        ``FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(replicate, shard))`` for other sizes.
        """
        return cls(sharding_strategy="HYBRID_SHARD", **kwargs)

    @property
    def sharding_strategy(self) -> ShardingStrategy:
        """The member of torch's enum that was asked for."""
        return ShardingStrategy[self._sharding.name]

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh over all processes, with the axis ``shard``, or ``replicate`` and ``shard``.

        Raises:
            RuntimeError: before ``fabric.launch()``.
        """
        if self._mesh is None:
            raise UsageError("The device mesh is made when the processes have started: call fabric.launch() first.")
        return self._mesh

    @property
    def mixed_precision_config(self) -> MixedPrecision | MixedPrecisionPolicy | None:
        """The dtypes of parameters in use and of sums: the user's object, else the precision's, else ``None``."""
        if self.mixed_precision is not None:
            return self.mixed_precision  # type: ignore[no-any-return]
        return getattr(self.precision, "mixed_precision_config", None)

    @property
    def process_group_backend(self) -> str:
        """The backend of the process group; with parts in the CPU's memory, gloo for that beside the device's own."""
        backend = super().process_group_backend
        if self._process_group_backend is not None or ":" in backend or read_cpu_offload(self.cpu_offload, "") is None:
            return backend
        device = self.root_device.type
        return backend if device == "cpu" else f"cpu:gloo,{device}:{backend}"

    def build_meshes(self) -> None:
        """Make the mesh; every rank calls it."""
        world = World(self.root_device.type, self.num_nodes, self.num_processes, self.timeout)
        self._mesh = make_mesh(self._sharding, self._mesh_request, world)

    def teardown(self) -> None:
        """Forget the mesh, whose groups end with the process group."""
        self._mesh = None
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mesh": None}

    def shard(self, module: nn.Module, compile: Compile | None) -> nn.Module:
        """Choose the units, have those that shall run again do so, compile each, then shard inner ones first.

        Units that are sharded already stay as they are, and what is around them becomes one unit.

        Raises:
            TypeError: a part is wrapped in ``FullyShardedDataParallel``, or split over other axes already.
            ValueError: a parameter has no dimensions to cut.
        """
        ignored, places = ignored_places(self._options, module)
        check_parts(module, places)
        dtypes = read_mixed_precision(self.mixed_precision_config)
        given = fsdp_modules(module)
        if given and self.auto_wrap_policy is not None:
            rank_zero_warn(
                f"auto_wrap_policy has no effect: {type(module).__name__} has units already, to which fully_shard was "
                "applied. Leave out the one or the other.",
                stacklevel=user_stacklevel(),
            )
        in_full = {
            part for part in module.modules() if part not in ignored and part is not module and dtypes.in_full(part)
        }
        units = [] if given else choose_units(module, self.auto_wrap_policy, ignored, places, in_full)
        parts: list[Any] = [unit.module for unit in units] or given
        checkpoint_modules(module, self.activation_checkpointing_policy, parts)
        if compile is not None:
            for part in parts or [module]:
                compile(part)
        Splitting(
            root=module,
            units=units,
            mesh=self.device_mesh,
            device=self.root_device,
            sharding=self._sharding,
            options=self._options,
            cpu_offload=self.cpu_offload,
            dtypes=dtypes,
            in_full=in_full,
            ignored=ignored,
            places=places,
        ).run()
        if self._options.forward_prefetch:
            for now, following in pairwise(fsdp_modules(module)):
                now.set_modules_to_forward_prefetch([following])
        _move_metrics(module, self.root_device)
        return module


def _one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise InvalidArgumentError(f"{name} and {alias} are the same argument, and both are given. Keep {name}.")
    return value if value is not None else other


def _move_metrics(module: nn.Module, device: torch.device) -> None:
    """Metrics of torchmetrics keep state outside of parameters and buffers, which only their own ``to`` knows."""
    torchmetrics = sys.modules.get("torchmetrics")  # not imported: then there are none
    if torchmetrics is not None:
        for part in module.modules():
            if isinstance(part, torchmetrics.Metric):
                part.to(device)
