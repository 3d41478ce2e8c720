"""One process, one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fabric_core.module_init import move_in_place
from fabric_core.strategies.base import Strategy

if TYPE_CHECKING:
    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.precision import Precision


class SingleDeviceStrategy(Strategy):
    """Everything runs in this process on one device; the collectives have nobody to talk to.

    Args:
        device: the device; ``Fabric(...)`` replaces it by the one it resolved, unless given.
        accelerator: the kind of device.
        checkpoint_io: where checkpoints go.
        precision: the dtypes.
    """

    sync_free: ClassVar[bool] = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision)
        self.given_device = None if device is None else torch.device(device)
        self._device = self.given_device or torch.device("cpu")

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take the first device, unless one was given to the constructor."""
        if self.given_device is None:
            self._device = devices[0]

    @property
    def root_device(self) -> torch.device:
        """The one device."""
        return self._device

    @property
    def is_global_zero(self) -> bool:
        """Always."""
        return True

    def module_to_device(self, module: nn.Module) -> None:
        """Move parameters and buffers, in place."""
        move_in_place(module, self._device)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """The tensor itself."""
        return tensor

    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """The tensor itself."""
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """Nobody to wait for."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object itself."""
        return obj
