"""What all strategies over several processes share: ranks, the process group, and collectives through it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_core.distributed.group import (
    DEFAULT_TIMEOUT,
    carrying_device,
    default_backend,
    is_initialized,
    join_group,
    leave_group,
)
from fabric_core.distributed.objects import broadcast_object
from fabric_core.distributed.tensors import gather_tensor, reduce_tensor
from fabric_core.errors import UsageError
from fabric_core.launchers.threads import set_num_threads_if_needed
from fabric_core.module_init import move_in_place
from fabric_core.rank_zero import rank_zero_only
from fabric_core.seeding import reset_seed
from fabric_core.strategies.base import Strategy

if TYPE_CHECKING:
    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.launcher import Launcher
    from fabric_core.abc.precision import Precision


class ParallelStrategy(Strategy):
    """One process per device, joined by ``torch.distributed``.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this node, one process each; resolved by ``Fabric(...)`` if not given.
        cluster_environment: who starts the processes; detected if not given.
        checkpoint_io: where checkpoints go.
        precision: the dtypes.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...; by default the accelerator's, else torch's for the device.
        timeout: how long a collective waits for the other ranks.
    """

    requires_launch: ClassVar[bool] = True
    multiple_devices: ClassVar[bool] = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self._process_group_backend = process_group_backend
        self.timeout = timeout or DEFAULT_TIMEOUT
        self.num_nodes = 1
        self._joined = False

    @property
    def global_rank(self) -> int:
        """Rank among all processes."""
        return self.cluster_environment.global_rank() if self.cluster_environment is not None else 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node."""
        return self.cluster_environment.local_rank() if self.cluster_environment is not None else 0

    @property
    def node_rank(self) -> int:
        """Rank of this node."""
        return self.cluster_environment.node_rank() if self.cluster_environment is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return self.num_nodes * self.num_processes

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def is_global_zero(self) -> bool:
        """Whether this process has rank 0 among all."""
        return self.global_rank == 0

    @property
    def root_device(self) -> torch.device:
        """The device of this process: the one at its local rank."""
        if not self.parallel_devices:
            raise UsageError(f"{type(self).__name__} has no devices yet: they are resolved by Fabric(...).")
        if self.local_rank >= len(self.parallel_devices):
            raise UsageError(
                f"This process has local rank {self.local_rank}, but devices= gives this node "
                f"{len(self.parallel_devices)}. Start as many processes as there are devices, or pass "
                f"devices={self.local_rank + 1}."
            )
        return self.parallel_devices[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """Each rank takes its share of the data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str:
        """The backend of the process group."""
        declared = self.accelerator.process_group_backend if self.accelerator is not None else None
        return self._process_group_backend or declared or default_backend(self.root_device)

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take devices and environment, which are those given to the constructor if any were."""
        self.num_nodes = num_nodes
        self.parallel_devices = devices
        self.cluster_environment = environment
        self._push_ranks()

    def script_launcher(self) -> Launcher | None:
        """What starts the other processes by running the script again; ``None`` where something else starts them."""
        environment = self.cluster_environment
        if environment is None or environment.creates_processes_externally:
            return None
        from fabric_core.launchers.script import ScriptLauncher

        return ScriptLauncher(environment, self.num_processes, self.num_nodes)

    def _push_ranks(self) -> None:
        environment = self.cluster_environment
        if environment is None:
            return
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        environment.set_world_size(self.world_size)
        rank_zero_only.rank = environment.global_rank()

    def setup_environment(self) -> None:
        """Set this process's device and join the process group."""
        self._push_ranks()
        super().setup_environment()
        set_num_threads_if_needed(self.num_processes)
        reset_seed()
        if self.cluster_environment is None:
            raise UsageError(f"{type(self).__name__} has no cluster environment yet: Fabric(...) detects it.")
        self._joined = join_group(self.cluster_environment, self.process_group_backend, self.timeout, self.root_device)
        rank_zero_only.rank = self.global_rank

    def teardown(self) -> None:
        """Tear down the parts, leave the process group if this strategy joined it, and tear down the environment."""
        try:
            super().teardown()
        finally:
            if self._joined:
                leave_group()
                self._joined = False
            if self.cluster_environment is not None:
                self.cluster_environment.teardown()

    def module_to_device(self, module: nn.Module) -> None:
        """Move parameters and buffers, in place."""
        move_in_place(module, self.root_device)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Shape ``(...)`` on each rank to ``(group size, ...)`` on every rank."""
        return gather_tensor(tensor, group, sync_grads) if is_initialized() else tensor

    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce in place; what is no tensor comes back as it is."""
        if isinstance(tensor, Tensor) and is_initialized():
            return reduce_tensor(tensor, group, reduce_op)
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, decided True."""
        vote = torch.tensor(int(decision), device=self.root_device)
        return bool(self.all_reduce(vote, reduce_op="min" if all else "max").item())

    def barrier(self, name: str | None = None) -> None:
        """Return once every rank has called it."""
        if not is_initialized():
            return
        device = self.root_device
        ids = [device.index] if device.index is not None and dist.get_backend() != "gloo" else None
        dist.barrier(device_ids=ids)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of global rank ``src``, pickled, on every rank."""
        if not is_initialized():
            return obj
        return broadcast_object(obj, src, carrying_device(self.root_device))
