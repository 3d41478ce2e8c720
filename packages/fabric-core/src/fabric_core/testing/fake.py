"""A backend without hardware: it computes on the CPU, behaves like a machine with several devices, and takes notes.

With it, resolution and the whole facade can be tested in one process without replacing a single function. Subclass to
change what it pretends: ``class Two(FakeAccelerator): count = 2``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fabric_core.abc.accelerator import Accelerator
from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.abc.precision import Precision
from fabric_core.accelerators.device_ids import parse_device_ids
from fabric_core.errors import InvalidArgumentError
from fabric_core.precision.casting import cast_floats
from fabric_core.strategies.base import Strategy


class FakeAccelerator(Accelerator):
    """``count`` devices that all are the CPU.

    Attributes:
        count: how many there are.
        available: what ``is_available`` says.
        current: the device that was set last, by this class's instances.
    """

    aliases: ClassVar[frozenset[str]] = frozenset({"gpu"})
    priority: ClassVar[int] = 100
    process_group_backend: ClassVar[str | None] = "gloo"
    count: ClassVar[int] = 4
    available: ClassVar[bool] = True

    def __init__(self) -> None:
        self.current: torch.device | None = None
        self.torn_down = False

    @staticmethod
    def name() -> str:
        """``"fake"``."""
        return "fake"

    @classmethod
    def device_type(cls) -> str:
        """The CPU does the work."""
        return "cpu"

    @classmethod
    def is_available(cls) -> bool:
        """What ``available`` says."""
        return cls.available

    @classmethod
    def auto_device_count(cls) -> int:
        """What ``count`` says."""
        return cls.count

    @classmethod
    def parse_devices(cls, devices: int | str | list[int]) -> list[int]:
        """Indices below ``count``."""
        return parse_device_ids(devices, range(cls.count), "fake")

    @classmethod
    def get_parallel_devices(cls, devices: Any) -> list[torch.device]:
        """The CPU for each index."""
        return [torch.device("cpu") for _ in parse_device_ids(devices, range(cls.count), "fake")]

    def setup_device(self, device: torch.device) -> None:
        """Note the device."""
        if device.type != "cpu":
            raise InvalidArgumentError(f"FakeAccelerator was given the device {device}; it pretends on cpu only.")
        self.current = device

    def teardown(self) -> None:
        """Note it."""
        self.torn_down = True


class FakePrecision(Precision):
    """``"fake"``: inputs in float64, outputs in the default dtype, a loss scale of 2; notes each hook that runs."""

    precision = "fake"
    compute_dtype = torch.float64
    scale = 2.0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Parameters to float64."""
        self.calls.append("convert_module")
        return module.double()

    def convert_input(self, data: Any) -> Any:
        """Inputs to float64."""
        self.calls.append("convert_input")
        return cast_floats(data, torch.float64)

    def convert_output(self, data: Any) -> Any:
        """Outputs to the default dtype."""
        self.calls.append("convert_output")
        return cast_floats(data, torch.get_default_dtype())

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        """Scale the loss."""
        self.calls.append("pre_backward")
        return tensor * self.scale

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Take the scale out, then step."""
        self.calls.append("optimizer_step")
        self.unscale_gradients(optimizer)
        return super().optimizer_step(optimizer, **kwargs)

    def unscale_gradients(self, optimizer: Any) -> None:
        """Divide gradients by the scale."""
        for parameter in self.main_params(optimizer):
            if parameter.grad is not None:
                parameter.grad /= self.scale


class FakeStrategy(Strategy):
    """Several devices in one process: every rank would hold the same values, so collectives can be computed alone.

    Attributes:
        calls: names of the life-cycle and wrapping methods, in order.
    """

    multiple_devices: ClassVar[bool] = True
    requires_launch: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls: list[str] = []
        self.devices: list[torch.device] = []
        self.num_nodes = 1

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take the devices."""
        self.calls.append("connect")
        self.devices, self.num_nodes = devices, num_nodes

    def setup_environment(self) -> None:
        """Set the device."""
        self.calls.append("setup_environment")
        super().setup_environment()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """A wrapper around the module, as a distributed strategy would make."""
        self.calls.append("setup_module")
        return FakeWrapper(module)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The inner module's."""
        return super().get_module_state_dict(module.module if isinstance(module, FakeWrapper) else module)

    def load_module_state_dict(self, module: nn.Module, state_dict: Any, strict: bool = True) -> None:
        """Into the inner module."""
        inner = module.module if isinstance(module, FakeWrapper) else module
        super().load_module_state_dict(inner, state_dict, strict)

    @property
    def root_device(self) -> torch.device:
        """The CPU."""
        return self.devices[0]

    @property
    def world_size(self) -> int:
        """As many as there are devices."""
        return len(self.devices) * self.num_nodes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of rank 0."""
        return {"num_replicas": self.world_size, "rank": 0}

    @property
    def is_global_zero(self) -> bool:
        """This process plays rank 0."""
        return True

    def module_to_device(self, module: nn.Module) -> None:
        """Note it and move."""
        self.calls.append("module_to_device")
        module.to(self.root_device)

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Note it."""
        self.calls.append("module_init_context")
        return super().module_init_context(empty_init)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """The same value from each rank."""
        return torch.stack([tensor] * self.world_size)

    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """The same value from each rank: only a sum changes it."""
        return tensor.mul_(self.world_size) if str(reduce_op).lower() == "sum" else tensor

    def barrier(self, name: str | None = None) -> None:
        """Nobody else is there."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Nobody else is there."""
        return obj


class FakeWrapper(nn.Module):
    """What ``FakeStrategy`` makes of a module; state dict keys carry a prefix, as those of real wrappers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's."""
        return self.module(*args, **kwargs)
