"""Changing the dtype of floating-point tensors in nested data, and torch's default dtype for a while."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fabric_core.collections import apply_to_collection

_PASS = (int, float, str, bool, type(None))


def cast_floats(data: Any, dtype: torch.dtype) -> Any:
    """``data`` with every floating-point tensor in ``dtype``; other tensors and values as they are.

    A lone tensor, or a tuple or dict of tensors that need no change, comes back as the same object.
    """
    kind = type(data)
    if kind is Tensor:
        return data if data.dtype is dtype or not data.is_floating_point() else data.to(dtype)
    if kind in _PASS:
        return data
    if kind is tuple or kind is list:
        new = [cast_floats(item, dtype) for item in data]
        return data if all(map(_same, new, data)) else kind(new)
    if kind is dict:
        fresh = {key: cast_floats(value, dtype) for key, value in data.items()}
        return data if all(map(_same, fresh.values(), data.values())) else fresh
    return apply_to_collection(data, Tensor, _cast, dtype, allow_frozen=True)


def _same(new: Any, old: Any) -> bool:
    return new is old


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class DefaultDtype:
    """``torch.set_default_dtype`` for the length of a ``with`` block; the previous one is read on entry.

    One object may be entered again inside itself.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._previous: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._previous.append(torch.get_default_dtype())
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._previous.pop())
