"""The cover around a module: forward runs through the precision and the strategy, all else is the user's module."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fabric_core.abc.overrides import overrides
from fabric_core.abc.strategy import Strategy
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.wrappers.compile import is_compiled
from fabric_core.wrappers.forward import explained_method, guarded_method, make_forward, redirected_method

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DEFAULT_FORWARD_METHODS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})


class FabricModule(nn.Module):
    """Calls what the strategy built, and is for everything else the module that the user passed.

    Attributes and the state dict are the original's, so that no key ever carries a wrapper's prefix.

    Args:
        forward_module: what the strategy made of the module; this is what gets called.
        strategy: where precision and backward come from.
        original_module: the user's module; the forward module if not given.
    """

    def __init__(self, forward_module: nn.Module, strategy: Strategy, original_module: nn.Module | None = None) -> None:
        super().__init__()
        own = self.__dict__
        own["_original_module"] = original_module if original_module is not None else forward_module
        own["_strategy"] = strategy
        own["training"] = own["_original_module"].training
        own["_forward_methods"] = set(DEFAULT_FORWARD_METHODS)
        # A sub-module, so that train(), eval(), to() and apply() reach it and, through it, the original.
        self._modules["_forward_module"] = forward_module
        # Chosen once: the bare module where nothing has to happen around its forward.
        own["_run"] = make_forward(forward_module, strategy)
        own["_method_context"] = strategy.method_context if overrides(strategy, Strategy, "method_context") else None

    @property
    def module(self) -> Any:
        """The module that the user passed to ``setup``."""
        return self.__dict__["_original_module"]

    @property
    def device(self) -> torch.device:
        """The device of the module: what it says itself, else that of its first parameter or buffer."""
        own = getattr(self._original_module, "device", None)
        if isinstance(own, torch.device):
            return own
        first = self._first_tensor()
        return first.device if first is not None else self._strategy.root_device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module: what it says itself, else that of its first floating-point parameter or buffer."""
        own = getattr(self._original_module, "dtype", None)
        if isinstance(own, torch.dtype):
            return own
        first = self._first_tensor(floating=True)
        return first.dtype if first is not None else torch.get_default_dtype()

    def _first_tensor(self, floating: bool = False) -> Tensor | None:
        for tensors in (self.parameters(), self.buffers()):
            for tensor in tensors:
                if not floating or tensor.is_floating_point():
                    return tensor
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward. Hooks registered on this object run; without any, nothing stands between call and module."""
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self._run(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs converted, forward under the precision's context, outputs converted."""
        return self._run(*args, **kwargs)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Send calls of ``method`` through the strategy and the precision, as calls of ``forward`` are.

        Args:
            method: a bound method of the module, or its name.

        Raises:
            TypeError: neither a method nor a name.
            ValueError: ``forward``, which needs no mark.
            AttributeError: the module has no such method.
        """
        if not isinstance(method, str) and not inspect.ismethod(inspect.unwrap(method)):
            raise InvalidTypeError(
                f"mark_forward_method() takes a method of the module or its name, not {type(method).__name__}: "
                'model.mark_forward_method("generate").'
            )
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise InvalidArgumentError('"forward" needs no mark: calling the module always goes through Fabric.')
        if not inspect.ismethod(getattr(self._original_module, name, None)):
            raise AttributeError(f"{type(self._original_module).__name__} has no method {name!r} to mark.")
        self._forward_methods.add(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer of the original module."""
        self._original_module.register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter of the original module."""
        self._original_module.register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a part of the original module; so does ``register_module``."""
        self._original_module.add_module(name, module)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The original module's state dict."""
        state: dict[str, Any] = self._strategy.module_state(self._original_module, *args, **kwargs)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load into the original module."""
        return self._strategy.load_module_state(self._original_module, state_dict, strict=strict, assign=assign)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The original module's parameters, under its own names."""
        return self._original_module.named_parameters(*args, **kwargs)  # type: ignore[no-any-return]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The original module's buffers, under its own names."""
        return self._original_module.named_buffers(*args, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        original = own.get("_original_module")
        if original is None:  # while unpickling
            raise AttributeError(name)
        if name in own["_forward_methods"] and hasattr(original, name):
            compiled = is_compiled(own["_modules"]["_forward_module"])
            return redirected_method(original, name, self, compiled, own["_method_context"])
        if name == "_forward_module":
            return own["_modules"][name]
        value = getattr(original, name)
        if inspect.ismethod(value):
            if own["_modules"]["_forward_module"] is not original:
                return guarded_method(original, name, value)
            if own["_strategy"].shards_in_place:
                return explained_method(original, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_original_module")
        if original is None:  # while nn.Module sets itself up
            super().__setattr__(name, value)
            return
        here, there = name in self.__dict__ or hasattr(type(self), name), hasattr(original, name)
        if here:
            super().__setattr__(name, value)
        if there or not here:
            setattr(original, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> FabricModule:
        copied = FabricModule(
            copy.deepcopy(self._forward_module, memo), self._strategy, copy.deepcopy(self._original_module, memo)
        )
        copied._forward_methods.update(self._forward_methods)
        for hooks in _HOOKS:
            copied.__dict__[hooks] = copy.copy(self.__dict__[hooks])
        return copied

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._original_module, name)
