"""How a model is spread over processes and devices. Ranks and collectives are in ``communicator``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.abc.communicator import Communicator

if TYPE_CHECKING:
    import torch

    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.launcher import Launcher
    from fabric_core.abc.precision import Precision
    from fabric_core.types import Path


class GradientSync(Protocol):
    """Switches the exchange of gradients between processes off for a while."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """While entered with ``enabled``, backward through ``module`` only accumulates. Restores what it found."""


class Strategy(Communicator):
    """The contract of a strategy: what core calls, and nothing else.

    Subclass ``fabric_core.strategies.Strategy`` in practice: it fills this contract with working defaults, so that a
    strategy for one device is a dozen lines, and ``ParallelStrategy`` for one over several processes.

    Attributes:
        fabric_api: the contract level the class was written for.
        setup_mode: ``"joint"`` wants ``setup(module, optimizer)``, ``"separate"`` wants ``setup_module`` and then
            ``setup_optimizers``, ``"either"`` takes both.
        requires_launch: collectives need ``Fabric.launch()`` first.
        multiple_devices: uses all devices given, not just the first.
        supported_accelerators: names of accelerators it runs on; ``None`` for all.
        precision_family: precision names are looked up as ``"<family>.<name>"`` in the registry; ``None`` for the
            general ones.
        moves_batches: its data loaders already put batches on the device.
        gradient_sync: the switch for gradient accumulation; ``None`` if there is none.
        resolved: what the last ``Fabric(...)`` put into this object, by kind; the next one replaces just that.
        sync_free: no gradients are exchanged at all, so that ``no_backward_sync`` has nothing to do.
        votes_on_saving: ``save_checkpoint`` fails on all ranks or on none, so that core asks nobody once more.
        shards_in_place: set-up splits the parameters of the user's own module, so that methods that use them outside
            of forward fail; core explains it then.
    """

    fabric_api: ClassVar[str] = "1"
    setup_mode: ClassVar[Literal["either", "joint", "separate"]] = "either"
    requires_launch: ClassVar[bool] = False
    multiple_devices: ClassVar[bool] = False
    supported_accelerators: ClassVar[frozenset[str] | None] = None
    precision_family: ClassVar[str | None] = None
    moves_batches: ClassVar[bool] = False
    sync_free: ClassVar[bool] = False
    votes_on_saving: ClassVar[bool] = False
    shards_in_place: ClassVar[bool] = False
    gradient_sync: GradientSync | None = None
    resolved: Mapping[str, Any] = MappingProxyType({})

    accelerator: Accelerator | None
    precision: Precision
    checkpoint_io: CheckpointIO
    launcher: Launcher | None

    @abstractmethod
    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take the resolved devices of this node and the environment; build the launcher. Touches no device."""

    @abstractmethod
    def setup_environment(self) -> None:
        """First call in every process: set the device, join the process group."""

    @abstractmethod
    def teardown(self) -> None:
        """Last call in every process."""

    @abstractmethod
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Wrap all together; same order back."""

    @abstractmethod
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Wrap the module alone."""

    def setup_compiled(
        self,
        module: nn.Module,
        optimizers: list[Optimizer],
        scheduler: Any,
        compile: Callable[[Any], Any],
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Wrap a module that the user had passed through ``torch.compile``, and compile what comes of it.

        By default the whole result is compiled. Override it to compile before wrapping, or part by part.

        Args:
            module: the module that was inside the compiled one.
            optimizers: to be set up with it; may be empty.
            scheduler: as for ``setup_module_and_optimizers``.
            compile: compiles a module or a function with the user's settings, and returns the compiled one.
        """
        if optimizers:
            module, optimizers, scheduler = self.setup_module_and_optimizers(module, optimizers, scheduler)
        else:
            module = self.setup_module(module)
        return compile(module), optimizers, scheduler

    @abstractmethod
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Wrap one optimizer alone."""

    @abstractmethod
    def validate_optimizer(self, optimizers: Iterable[Optimizer]) -> None:
        """``RuntimeError`` if an optimizer cannot be set up now, as one that still refers to meta parameters."""

    @abstractmethod
    def module_to_device(self, module: nn.Module) -> None:
        """Move parameters and buffers to ``root_device``, in place."""

    def method_context(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Entered around a method that the user marked with ``mark_forward_method``, inside the wrapper's forward.

        Args:
            module: the user's module, whose method runs.
        """
        return nullcontext()

    @abstractmethod
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Entered while the user creates tensors."""

    @abstractmethod
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Entered while the user builds a module; ``empty_init=True`` leaves weights uninitialised."""

    @abstractmethod
    def process_dataloader(self, dataloader: Any) -> Any:
        """Replace a data loader by one that feeds the devices faster, or return it."""

    @property
    @abstractmethod
    def changes_backward(self) -> bool:
        """Whether ``loss.backward()`` alone would be wrong, so that users must call ``fabric.backward(loss)``."""

    @property
    @abstractmethod
    def changes_step(self) -> bool:
        """Whether ``optimizer.step()`` must pass through ``optimizer_step``."""

    @abstractmethod
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward."""

    def step_target(self, optimizer: Optimizer) -> Any:
        """What ``optimizer.step()`` really steps: the optimizer, or the engine that owns it."""
        return optimizer

    @abstractmethod
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step what ``step_target`` returned."""

    def zero_grad(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """What ``optimizer.zero_grad()`` does; override it where gradients are kept by more than the optimizer.

        Args:
            optimizer: as the strategy set it up.
            *args: of the optimizer's own ``zero_grad``.
            **kwargs: of the optimizer's own ``zero_grad``.
        """
        optimizer.zero_grad(*args, **kwargs)

    @abstractmethod
    def clip_gradients_norm(
        self, module: nn.Module, optimizer: Optimizer, max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale gradients down to ``max_norm``; return the norm before, shape ``()``."""

    @abstractmethod
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Limit each gradient element."""

    def module_state(self, module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``model.state_dict()`` gives after set-up; override it where the module's own would be wrong.

        Any rank may call it, alone.

        Args:
            module: the user's module.
            *args: of its own ``state_dict``.
            **kwargs: of its own ``state_dict``.
        """
        state: dict[str, Any] = module.state_dict(*args, **kwargs)
        return state

    def load_module_state(
        self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """What ``model.load_state_dict()`` does after set-up; override it where weights are held in other places too.

        Args:
            module: the user's module.
            state_dict: as ``module.load_state_dict`` takes it.
            strict: the keys must agree.
            assign: as ``module.load_state_dict`` takes it.

        Returns:
            The missing and the unexpected keys.
        """
        return module.load_state_dict(state_dict, strict=strict, assign=assign)

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """What ``optimizer.load_state_dict()`` does after set-up: takes what ``get_optimizer_state`` gave."""
        optimizer.load_state_dict(state_dict)

    @abstractmethod
    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state: this rank's parts of sharded tensors; may be empty off rank 0 for one that gathers."""

    @abstractmethod
    def save_checkpoint(
        self, path: Path, state: dict[str, Any], storage_options: Any = None, filter: dict[str, Any] | None = None
    ) -> None:
        """Write the state of the objects in ``state``; complete or absent."""

    @abstractmethod
    def load_checkpoint(
        self, path: Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore the objects in ``state`` in place; return what was not asked for."""
