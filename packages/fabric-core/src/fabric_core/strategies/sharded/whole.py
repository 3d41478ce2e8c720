"""Initialising split tensors as if they were whole: every process draws all numbers and keeps its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from fabric_core.checkpoint.dtensors import local_of, part_for
from fabric_core.module_init import own_tensors
from fabric_core.strategies.sharded.unfilled import fill

_DRAWING: Final = frozenset(
    {
        Tensor.uniform_,
        Tensor.normal_,
        Tensor.random_,
        Tensor.bernoulli_,
        Tensor.exponential_,
        Tensor.cauchy_,
        Tensor.log_normal_,
        Tensor.geometric_,
    }
)


@contextmanager
def whole_tensors(part: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the part's own split tensors are whole, with undefined values.

    Those of its children stay split, but drawing numbers into them is as if they were whole.
    """
    held = [(table, name, t) for table, name, t in own_tensors(part) if isinstance(t, DTensor)]
    for table, name, tensor in held:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=local_of(tensor).device)
        fill(whole)
        is_parameter = isinstance(tensor, nn.Parameter)
        table[name] = nn.Parameter(whole, requires_grad=tensor.requires_grad) if is_parameter else whole
    try:
        with _DrawWhole():
            yield
    finally:
        for table, name, tensor in held:
            whole, table[name] = table[name], tensor
            _keep_part(whole, tensor)


class _DrawWhole(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_init = getattr(func, "__module__", None) == nn.init.__name__
        if not is_init and func not in _DRAWING:
            return func(*args, **kwargs)
        target, rest = (args[0], args[1:]) if args else (kwargs.pop("tensor"), ())
        if not isinstance(target, DTensor):
            return func(target, *rest, **kwargs)
        whole = torch.empty(target.shape, dtype=target.dtype, device=local_of(target).device)
        func(whole, *rest, **kwargs)
        _keep_part(whole, target)
        return target


def _keep_part(whole: Tensor, tensor: DTensor) -> None:
    with torch.no_grad():
        part, memory = part_for(whole.detach(), tensor)
        memory.copy_(part)
