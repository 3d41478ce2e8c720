"""What a loop calls every step, and the contexts it opens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from fabric_core.collections import move_data_to_device
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.facade.base import FabricBase
from fabric_core.rank_zero import rank_zero_deprecation
from fabric_core.warnings import possible_user_warning
from fabric_core.wrappers.compile import unwrap_compiled
from fabric_core.wrappers.forward import inside_fabric_backward
from fabric_core.wrappers.module import FabricModule
from fabric_core.wrappers.optimizer import FabricOptimizer
from fabric_core.wrappers.unwrap import unwrap


class Stepping(FabricBase):
    """``backward``, ``clip_gradients``, ``autocast``, ``no_backward_sync``, ``to_device``, ``init_*``."""

    def backward(self, tensor: Tensor, *args: Any, model: FabricModule | None = None, **kwargs: Any) -> None:
        """Back-propagate from ``tensor``; stands in for ``loss.backward()``.

        Args:
            tensor: the loss, usually of shape ``()``.
            *args: passed on to ``Tensor.backward``.
            model: the module it belongs to, where a strategy holds several and must know.
            **kwargs: passed on to ``Tensor.backward``.
        """
        if not isinstance(tensor, Tensor):
            raise InvalidTypeError(f"fabric.backward() takes the loss tensor, not a {type(tensor).__name__}.")
        if self._direct_backward:
            tensor.backward(*args, **kwargs)
            return
        module = None if model is None else unwrap(model)
        with inside_fabric_backward():
            self._strategy.backward(tensor, module, *args, **kwargs)

    def clip_gradients(
        self,
        module: nn.Module | FabricModule,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Limit the optimizer's gradients, by element or by norm.

        Args:
            module: the module that the gradients belong to.
            optimizer: over the parameters whose gradients are limited.
            clip_val: limit for each element, or
            max_norm: limit for the norm over all of them; exactly one of the two.
            norm_type: which norm; ``"inf"`` or ``math.inf`` for the largest element.
            error_if_nonfinite: ``RuntimeError`` if the norm is NaN or infinite, before anything is changed.

        Returns:
            The norm before clipping, shape ``()``, for ``max_norm``; ``None`` for ``clip_val``.
        """
        if (clip_val is None) == (max_norm is None):
            passed = "neither" if clip_val is None else "both"
            raise InvalidArgumentError(
                f"fabric.clip_gradients() takes either clip_val=... or max_norm=..., and got {passed}."
            )
        inner = optimizer.optimizer if type(optimizer) is FabricOptimizer else optimizer
        forward = module._forward_module if type(module) is FabricModule else unwrap(module)
        if clip_val is not None:
            self._strategy.clip_gradients_value(forward, inner, clip_val=clip_val)
            return None
        norm: Tensor = self._strategy.clip_gradients_norm(
            forward, inner, max_norm=max_norm, norm_type=float(norm_type), error_if_nonfinite=error_if_nonfinite
        )
        return norm

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision's forward context, for computations outside the module's forward."""
        return self._precision.forward_context()

    def no_backward_sync(self, module: FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """While entered, forward and backward of ``module`` only accumulate gradients, without exchanging them.

        For gradient accumulation: ``with fabric.no_backward_sync(model, enabled=is_accumulating): ...``.

        Raises:
            TypeError: the module was not set up.
        """
        inner = unwrap_compiled(module)[0]
        if type(inner) is not FabricModule:
            raise InvalidTypeError(
                f"fabric.no_backward_sync() takes the module that fabric.setup() returned, not a bare "
                f"{type(module).__name__}."
            )
        if self._strategy.sync_free:
            return nullcontext()
        control = self._strategy.gradient_sync
        if control is None:
            possible_user_warning(
                f"strategy={self._plan.strategy.name!r} cannot skip the exchange of gradients, so "
                "fabric.no_backward_sync() has no effect. Results are right, accumulation is just not faster."
            )
            return nullcontext()
        context: AbstractContextManager[Any] = control.no_backward_sync(unwrap(inner), enabled)
        return context

    def to_device(self, obj: Any) -> Any:
        """Move a module (in place) or everything with ``.to`` in a nested collection to this process's device."""
        if isinstance(obj, nn.Module):
            self._strategy.accelerator.setup_device(self.device)
            self._strategy.module_to_device(obj)
            return obj
        return move_data_to_device(obj, self.device)

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Tensors created inside are on the device at once, in the precision's dtype."""
        context: AbstractContextManager[Any] = self._strategy.tensor_init_context()
        return context

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Parameters created inside are on the device at once, in the precision's dtype.

        Args:
            empty_init: leave the weights uninitialised, because a checkpoint follows; strategies that shard use the
                meta device then. ``None`` leaves it to the strategy.
        """
        self._require_launch("init_module")
        context: AbstractContextManager[Any] = self._strategy.module_init_context(empty_init=empty_init)
        return context

    def sharded_model(self) -> AbstractContextManager[Any]:
        """Deprecated: ``setup_module`` shards, and ``init_module(empty_init=True)`` builds without memory."""
        rank_zero_deprecation(
            "fabric.sharded_model() is deprecated: build the model under fabric.init_module(empty_init=True), and "
            "fabric.setup_module(model) shards it."
        )
        context: AbstractContextManager[Any] = getattr(self._strategy, "module_sharded_context", nullcontext)()
        return context
