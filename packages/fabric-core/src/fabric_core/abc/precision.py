"""What a numerical precision must offer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.abc.communicator import Communicator
from fabric_core.abc.overrides import overrides


class Precision:
    """Decides the dtypes of parameters, inputs, compute and outputs. This base class is ``"32-true"``: it does nothing.

    Override only what you need. Core looks at what a subclass overrides and skips the rest, so that a hook which is
    not overridden costs nothing per step.

    Attributes:
        fabric_api: the contract level the class was written for.
        precision: the name it goes by, such as ``"bf16-mixed"``.
        compute_dtype: the dtype that matrix multiplications run in, for FLOP counts and memory estimates.
        supported_accelerators: names of accelerators it runs on; ``None`` for all.
    """

    fabric_api: ClassVar[str] = "1"
    supported_accelerators: ClassVar[frozenset[str] | None] = None
    precision: str = "32-true"
    compute_dtype: torch.dtype = torch.float32

    @property
    def changes_forward(self) -> bool:
        """Whether there is anything to do around a forward; if not, the module itself is called."""
        return overrides(self, Precision, "forward_context", "convert_input", "convert_output")

    @property
    def changes_backward(self) -> bool:
        """Whether ``loss.backward()`` alone would be wrong, so that users must call ``fabric.backward(loss)``."""
        return overrides(self, Precision, "pre_backward", "backward", "post_backward")

    @property
    def changes_step(self) -> bool:
        """Whether the optimizer must be stepped through this object."""
        return overrides(self, Precision, "optimizer_step")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Change the parameters' dtype or swap layers, before the module moves to its device."""
        return module

    def convert_placed_module(self, module: nn.Module, ranks: Communicator) -> None:
        """Change the module once more, in place, after ``setup`` has moved it to its device; all ranks come here.

        For what is to happen with the values on the device, such as quantising them, and for tensors that the module
        holds outside of its parameters and buffers: nobody but the precision can make these equal on all ranks. Not
        called with ``move_to_device=False``.

        Args:
            module: what ``convert_module`` returned, on ``ranks.root_device``; not wrapped by the strategy yet.
            ranks: the processes that set the module up together.
        """

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Entered while the user creates tensors."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Entered while the user builds a module."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Entered around every forward."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Change the dtypes of what goes into forward; any nesting of containers."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Change the dtypes of what comes out of forward; any nesting of containers."""
        return data

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Before backward; the returned tensor is the one that backward starts from."""
        return tensor

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward."""
        tensor.backward(*args, **kwargs)

    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """After backward."""
        return tensor

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step the optimizer; ``closure`` may be among the keywords."""
        return optimizer.step(**kwargs)

    def main_params(self, optimizer: Optimizer) -> Any:
        """The parameters whose gradients are clipped."""
        for group in optimizer.param_groups:
            yield from group["params"]

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring gradients back to their true scale before they are clipped."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for training to go on exactly, such as the loss scale."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""

    def teardown(self) -> None:
        """Undo global changes made since construction."""
