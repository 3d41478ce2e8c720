"""Working defaults for the strategy contract: what a strategy for one process does, and most others too."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.abc.overrides import overrides
from fabric_core.abc.precision import Precision
from fabric_core.abc.strategy import Strategy as StrategyContract
from fabric_core.checkpoint.portable import clean_keys, live_keys
from fabric_core.checkpoint.restore import Access, load_module, restore
from fabric_core.checkpoint.state import collect_state
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.checkpoint.write import write_checkpoint
from fabric_core.collections import move_data_to_device
from fabric_core.errors import UsageError
from fabric_core.module_init import EmptyInit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.environment import ClusterEnvironment
    from fabric_core.abc.launcher import Launcher
    from fabric_core.types import Path


class Strategy(StrategyContract):
    """The base to subclass. Seven members are left: ``root_device``, ``is_global_zero``, ``module_to_device`` and the
    four collectives.

    Args:
        accelerator: the kind of device; resolved by ``Fabric(...)`` if not given.
        checkpoint_io: where checkpoints go; files if not given.
        precision: the dtypes; single precision if not given.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.accelerator = accelerator
        self._checkpoint_io = checkpoint_io
        self._default_io: CheckpointIO | None = None
        self._precision = precision
        self.launcher: Launcher | None = None

    # Read every step: plain attributes would be faster, so the wrappers keep what they need at set-up.
    @property
    def precision(self) -> Precision:
        """The dtypes. Single precision until another is set."""
        if self._precision is None:
            self._precision = Precision()
        return self._precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        self._precision = precision

    @property
    def has_own_precision(self) -> bool:
        """Whether a precision was given or set."""
        return self._precision is not None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Where checkpoints go. Files until another is set."""
        if self._checkpoint_io is None:
            self._checkpoint_io = self._default_io = TorchCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    @property
    def has_own_checkpoint_io(self) -> bool:
        """Whether a checkpoint IO was given or set."""
        return self._checkpoint_io is not None and self._checkpoint_io is not self._default_io

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "launcher": None}  # a spawned worker starts no processes of its own

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Nothing to take by default."""

    def setup_environment(self) -> None:
        """Set this process's device."""
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)

    def teardown(self) -> None:
        """Tear down precision, checkpoint IO and accelerator, each even if the one before fails."""
        with ExitStack() as stack:
            if self.accelerator is not None:
                stack.callback(self.accelerator.teardown)
            if self._checkpoint_io is not None:
                stack.callback(self._checkpoint_io.teardown)
            if self._precision is not None:
                stack.callback(self._precision.teardown)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Each by itself; the scheduler stays as it is."""
        return self.setup_module(module), [self.setup_optimizer(o) for o in optimizers], scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Nothing to wrap by default."""
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Nothing to wrap by default."""
        return optimizer

    def validate_optimizer(self, optimizers: Iterable[Optimizer]) -> None:
        """``RuntimeError`` if an optimizer refers to parameters without memory."""
        for optimizer in optimizers:
            if any(parameter.is_meta for group in optimizer.param_groups for parameter in group["params"]):
                raise UsageError(
                    f"The optimizer {type(optimizer).__name__} refers to parameters on the meta device, which have no "
                    "values yet. Set up the module first, then create the optimizer from its parameters: "
                    "model = fabric.setup_module(model); optimizer = fabric.setup_optimizers(Adam(model.parameters()))."
                )

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New tensors are on the device, in the precision's dtype."""
        return _entered(self.root_device, self.precision.tensor_init_context())

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """New parameters are on the device, in the precision's dtype; ``empty_init`` skips their initialisation."""
        return _entered(self.root_device, self.precision.module_init_context(), EmptyInit(bool(empty_init)))

    def process_dataloader(self, dataloader: Any) -> Any:
        """Replace a data loader by one that the devices feed from faster; by default the same."""
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None) -> Any:
        """Everything in ``batch`` that has ``.to``, on ``device`` or the root device."""
        return move_data_to_device(batch, device or self.root_device)

    @property
    def changes_backward(self) -> bool:
        """Whether this class or the precision brings its own backward."""
        return overrides(self, Strategy, "backward") or self.precision.changes_backward

    @property
    def changes_step(self) -> bool:
        """Whether this class or the precision brings its own step."""
        return overrides(self, Strategy, "optimizer_step", "step_target") or self.precision.changes_step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Backward through the precision's hooks."""
        precision = self.precision
        scaled = precision.pre_backward(tensor, module)
        tensor = tensor if scaled is None else scaled  # a hook may just look
        precision.backward(tensor, module, *args, **kwargs)
        precision.post_backward(tensor, module)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step through the precision."""
        return self.precision.optimizer_step(optimizer, **kwargs)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Scale the optimizer's gradients down to ``max_norm``; return the norm before, shape ``()``."""
        from fabric_core.strategies.clipping import clip_norm

        self.precision.unscale_gradients(optimizer)
        return clip_norm(self.precision.main_params(optimizer), max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Limit each gradient element to ``[-clip_val, clip_val]``."""
        from fabric_core.strategies.clipping import clip_value

        self.precision.unscale_gradients(optimizer)
        clip_value(self.precision.main_params(optimizer), clip_val)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks (or any, with ``all=False``) decided True. Every rank calls it."""
        return decision

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The module's state dict, keys without any wrapper's prefix."""
        state: dict[str, Any] = clean_keys(module.state_dict())
        return state

    def load_module_state_dict(self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Put ``state_dict``, with keys as ``get_module_state_dict`` gives them, into the module, in place."""
        load_module(module, live_keys(state_dict, module), strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state dict; one that is sharded over ranks is gathered first and empty off rank 0."""
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
            return optimizer.state_dict() if self.is_global_zero else {}
        return optimizer.state_dict()

    def save_checkpoint(
        self, path: Path, state: dict[str, Any], storage_options: Any = None, filter: dict[str, Any] | None = None
    ) -> None:
        """Rank 0 writes one file; every rank must call, because taking the state may need all of them."""
        plain = collect_state(
            state, filter, module_state=self.get_module_state_dict, optimizer_state=self.get_optimizer_state
        )
        if self.is_global_zero:
            write_checkpoint(self.checkpoint_io, path, plain, storage_options)

    def load_checkpoint(
        self, path: Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Every rank reads what it needs of a file or a sharded folder, straight into the objects in ``state``.

        Whatever strategy wrote it. Optimizers are restored by the order of their parameters or by the names of these,
        as the checkpoint has it. Every rank must call.
        """
        if self.accelerator is not None:
            self.accelerator.empty_cache()
        return restore(self.checkpoint_io, path, state, strict, weights_only, access=self._access())

    def _access(self) -> Access:
        ranks = None
        if self.requires_launch:
            from fabric_core.checkpoint.sharded.ranks import ranks_of

            ranks = ranks_of()
        return Access(self.load_module_state_dict, self.get_module_state_dict, ranks)


@contextmanager
def _entered(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """All contexts, entered when this one is, in order."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
