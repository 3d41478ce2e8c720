"""What weights and optimizer states take, in bytes, with all that belongs to a quantised weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adapters import LowRankLinear, of_adapter

Bytes = dict[str, int]
"""Bytes by part of the model: ``linear layers``, ``adapters`` and ``the rest``."""


def weights(model: nn.Module) -> Bytes:
    """The bytes of parameters and buffers; of quantised layers also of their scales and tables.

    All of it is in the state dict, which is what is counted.
    """
    linear = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, nn.Linear | LowRankLinear))
    parts: dict[str, list[Tensor]] = {"linear layers": [], "adapters": [], "the rest": []}
    for key, value in model.state_dict().items():
        part = "adapters" if of_adapter(key) else "linear layers" if key.startswith(linear) else "the rest"
        parts[part].append(value)
    return {part: nbytes(tensors) for part, tensors in parts.items()}


def states(optimizer: Optimizer) -> int:
    """The bytes of an optimizer's state. Parameters may share tables, which count once."""
    return nbytes(_tensors(optimizer.state.values()))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of ``tensors``; the same memory counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def comparison(before: Bytes, after: Bytes, precision: str) -> str:
    """A table of both, for people."""
    lines = [f"{'weights':<16}{'32-true':>12}{precision:>20}"]
    for part, size in after.items():
        factor = f"   {before[part] / size:.2f} times smaller" if before.get(part, 0) > size else ""
        lines.append(f"  {part:<14}{before.get(part, 0):>12,}{size:>20,}{factor}")
    return "\n".join(lines)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
