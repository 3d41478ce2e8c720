"""What happens around a forward: precision, redirection of marked methods, and guards against calls past Fabric."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fabric_core.abc.precision import Precision
from fabric_core.abc.strategy import Strategy
from fabric_core.collections import for_each
from fabric_core.errors import FabricError, UsageError
from fabric_core.wrappers.compile import step_over


def make_forward(module: nn.Module, strategy: Strategy) -> Callable[..., Any]:
    """The cheapest callable that does all that must happen around the module's forward: often the module itself."""
    precision = strategy.precision
    if precision.changes_forward:
        forward: Callable[..., Any] = PrecisionForward(module, precision)
    else:
        forward = module
    return GuardedForward(forward) if strategy.changes_backward else forward


class PrecisionForward:
    """Convert inputs, run forward under the precision's context, convert outputs."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self.module = module
        self.precision = precision

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        precision = self.precision
        args = precision.convert_input(args)
        if kwargs:
            kwargs = precision.convert_input(kwargs)
        with precision.forward_context():
            output = self.module(*args, **kwargs)
        return precision.convert_output(output)


class GuardedForward:
    """Run forward and see to it that backward through its outputs comes from ``fabric.backward``."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        output = self.forward(*args, **kwargs)
        for_each(output, Tensor, _guard_backward)
        return output


class _BackwardsRunning:
    """How many ``fabric.backward`` calls are running in this process.

    A count under a lock, not a context variable: autograd runs hooks of device tensors in threads of its own, which
    do not inherit the caller's context.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self.count += n


_backwards = _BackwardsRunning()


@contextmanager
def inside_fabric_backward() -> Iterator[None]:
    """Marks the length of a ``fabric.backward`` call."""
    _backwards.add(1)
    try:
        yield
    finally:
        _backwards.add(-1)


def _guard_backward(tensor: Tensor) -> None:
    if tensor.requires_grad:
        tensor.register_hook(_check_backward)


def _check_backward(grad: Tensor) -> None:
    if not _backwards.count:
        raise UsageError(
            "loss.backward() or torch.autograd.grad() went through the output of a module that Fabric set up, but this "
            "strategy or precision has work to do in backward. Call fabric.backward(loss) instead."
        )


def redirected_method(
    original: nn.Module,
    name: str,
    call_wrapper: Callable[..., Any],
    compiled: bool = False,
    context: Callable[[nn.Module], AbstractContextManager[Any]] | None = None,
) -> Callable[..., Any]:
    """``name`` of the user's module, run as if it were its forward: ``call_wrapper`` leads to it and back.

    ``compiled`` says that it leads through a compiled module; ``context(original)`` is entered around the method.
    """
    method = getattr(original, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        attributes = original.__dict__
        absent = object()
        previous = attributes.get("forward", absent)

        def restore() -> None:
            if previous is absent:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = previous

        def forward_once(*args: Any, **kwargs: Any) -> Any:
            restore()  # first of all: the method may call the module's real forward
            if context is None:
                return method(*args, **kwargs)
            with context(original):
                return method(*args, **kwargs)

        if compiled:  # the compiler would trace the change of `forward`, and not see it undone in time
            restore, forward_once = step_over(restore), step_over(forward_once)
        attributes["forward"] = forward_once
        try:
            return call_wrapper(*args, **kwargs)
        finally:
            restore()

    return call


def guarded_method(original: nn.Module, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, refused as soon as it calls the module or a part of it past the strategy's wrapper."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        parts: set[int] = set()

        def check(module: nn.Module, _: Any) -> None:
            if threading.get_ident() != thread:
                return
            parts.update(map(id, original.modules()) if not parts else ())
            if id(module) in parts:
                raise UsageError(
                    f"{type(original).__name__}.{name}() runs parts of the module, but past the strategy's wrapper, "
                    "so that gradients would not be exchanged. Mark it once after setup: "
                    f'model.mark_forward_method("{name}").'
                )

        handle = register_module_forward_pre_hook(check)
        try:
            return method(*args, **kwargs)
        finally:
            handle.remove()

    return call


def explained_method(original: nn.Module, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of a module whose parameters are split in place; says what to do where it uses them as if whole."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            if isinstance(error, FabricError) or "DTensor" not in str(error):
                raise
            raise UsageError(
                f"{type(original).__name__}.{name}() uses parameters of the module directly, of which each process "
                "holds a part only, except during forward. Mark it once after setup, so that it runs as forward does: "
                f'model.mark_forward_method("{name}").'
            ) from error

    return call
