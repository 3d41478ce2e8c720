"""Data parallelism: every process holds the whole model, gradients are averaged during backward."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_core.distributed.group import DEFAULT_TIMEOUT
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.strategies.parallel import ParallelStrategy
from fabric_core.strategies.sharded.agreement import make_equal

if TYPE_CHECKING:
    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.launcher import Launcher
    from fabric_core.abc.precision import Precision

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class DDPGradientSync:
    """Gradient accumulation for DDP: no exchange while entered."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """DDP's own ``no_sync`` if enabled; nothing for a module without gradients to exchange."""
        if not _has_gradients(module):
            return nullcontext()
        if not isinstance(module, DistributedDataParallel):
            raise InvalidTypeError(
                f"no_backward_sync() was given a {type(module).__name__} that is not wrapped in "
                "DistributedDataParallel. Pass the module that fabric.setup() returned."
            )
        return module.no_sync() if enabled else nullcontext()


class DDPStrategy(ParallelStrategy):
    """``torch.nn.parallel.DistributedDataParallel`` in one process per device.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this node.
        cluster_environment: who starts the processes.
        checkpoint_io: where checkpoints go.
        precision: the dtypes.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...
        timeout: how long a collective waits for the other ranks.
        start_method: ``"popen"`` runs the script again for each rank; ``"spawn"`` and ``"fork"`` start processes of
            this one and need ``fabric.launch(function)``.
        **ddp_kwargs: further arguments of ``DistributedDataParallel``.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        **ddp_kwargs: Any,
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
        if start_method not in ("popen", "spawn", "fork", "forkserver"):
            raise InvalidArgumentError(
                f'DDPStrategy(start_method={start_method!r}): expected "popen", "spawn", "fork" or "forkserver".'
            )
        self.start_method = start_method
        self.ddp_kwargs = ddp_kwargs
        self.gradient_sync = DDPGradientSync()

    @classmethod
    def spawn(cls, **kwargs: Any) -> DDPStrategy:
        """``"ddp_spawn"``: fresh worker processes run the function given to ``launch``."""
        return cls(start_method="spawn", **kwargs)

    @classmethod
    def fork(cls, **kwargs: Any) -> DDPStrategy:
        """``"ddp_fork"`` and ``"ddp_notebook"``: forked workers run the function given to ``launch``."""
        return cls(start_method="fork", **kwargs)

    @classmethod
    def find_unused_parameters_true(cls, **kwargs: Any) -> DDPStrategy:
        """``"ddp_find_unused_parameters_true"``: for models whose forward does not use every parameter each time."""
        return cls(find_unused_parameters=True, **kwargs)

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take devices and environment, and choose the launcher by the start method."""
        super().connect(devices=devices, num_nodes=num_nodes, environment=environment, interactive=interactive)
        self.launcher = self._make_launcher()

    def _make_launcher(self) -> Launcher | None:
        environment = self.cluster_environment
        if self.start_method == "popen":
            return self.script_launcher()
        if environment is None or environment.creates_processes_externally:
            return None
        from fabric_core.launchers.spawn import SpawnLauncher

        check = self.accelerator.check_fork_safe if self.accelerator is not None else None
        return SpawnLauncher(environment, self.num_processes, self.num_nodes, self.start_method, check)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap in ``DistributedDataParallel``; rank 0's parameters and buffers go to every rank.

        A module in which no parameter requires gradients has nothing to exchange. It gets rank 0's values too, and
        comes back as it is. To train parts of it later, let them require gradients before ``setup``.
        """
        if not _has_gradients(module):
            held = [tensor.data for tensor in chain(module.parameters(), module.buffers()) if not tensor.is_meta]
            make_equal(held, self.root_device)
            return module
        device = self.root_device
        device_ids = None if device.type == "cpu" else [device.index]
        return DistributedDataParallel(module, device_ids=device_ids, **self.ddp_kwargs)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of the module inside the DDP wrapper."""
        return super().get_module_state_dict(_inner(module))

    def load_module_state_dict(self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load into the module inside the DDP wrapper."""
        super().load_module_state_dict(_inner(module), state_dict, strict)


def _has_gradients(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module
