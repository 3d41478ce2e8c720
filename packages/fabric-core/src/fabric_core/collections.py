"""Mapping over nested containers, and moving a batch to a device at the price of one attribute read per tensor.

Everything here knows the same containers: dict and other mappings, list, tuple, namedtuple and other sequences, and
dataclass instances. Text, bytes and sets are values, not containers.
"""

from __future__ import annotations

import copy
import sys
from collections import UserDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.types import Device

Visit = Callable[[Any], Any]
Types = type | tuple[type, ...]

_VALUES = (str, bytes, bytearray, memoryview, range)
_ABSENT = object()


def apply_to_collection(
    data: Any,
    dtype: Types,
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: Types | None = None,
    include_none: bool = True,
    allow_frozen: bool = False,
    **kwargs: Any,
) -> Any:
    """A copy of ``data`` in which every ``dtype`` instance ``x`` is replaced by ``function(x, *args, **kwargs)``.

    Containers keep their type and order. Values of other types are taken over as they are.

    Args:
        data: a value, or containers nested to any depth.
        dtype: the type, or types, to replace.
        function: called with each of them.
        args: further arguments of ``function``.
        wrong_dtype: types to leave alone although they are instances of ``dtype``.
        include_none: if false, items that come out as ``None`` are dropped from sequences and mappings; fields of
            namedtuples and dataclasses, which cannot be dropped, then keep their value.
        allow_frozen: whether frozen dataclasses may be rebuilt.
        kwargs: further arguments of ``function``.

    Raises:
        InvalidArgumentError: a field of a frozen dataclass would change, and ``allow_frozen`` is false.
    """

    def visit(item: Any) -> Any:
        if isinstance(item, dtype) and (wrong_dtype is None or not isinstance(item, wrong_dtype)):
            return function(item, *args, **kwargs)
        return _visit_children(item, visit, include_none, allow_frozen)  # noqa: F821 - deleted once it has run

    try:
        return visit(data)
    finally:
        del visit  # it refers to itself, and would keep what it works on alive until the next garbage collection


def for_each(data: Any, dtype: Types, function: Callable[[Any], Any]) -> None:
    """Call ``function`` on every ``dtype`` instance in ``data``, in the same order as above; build nothing."""
    if isinstance(data, dtype):
        function(data)
    elif isinstance(data, Mapping):
        for value in data.values():
            for_each(value, dtype, function)
    elif isinstance(data, Sequence) and not isinstance(data, _VALUES):
        for item in data:
            for_each(item, dtype, function)
    elif is_dataclass(data) and not isinstance(data, type):
        for field in fields(data):
            for_each(getattr(data, field.name, None), dtype, function)


def _visit_children(data: Any, visit: Visit, include_none: bool = True, allow_frozen: bool = True) -> Any:
    if isinstance(data, Mapping):
        new = {key: visit(value) for key, value in data.items()}
        return _like_mapping(data, new if include_none else {k: v for k, v in new.items() if v is not None})
    if isinstance(data, Sequence) and not isinstance(data, _VALUES):
        items = [visit(item) for item in data]
        if not include_none:
            is_record = _is_namedtuple(data)
            items = [
                old if item is None else item
                for item, old in zip(items, data, strict=True)
                if is_record or item is not None
            ]
        return _like_sequence(data, items)
    if is_dataclass(data) and not isinstance(data, type):
        return _visit_fields(data, visit, include_none, allow_frozen)
    return data


def _visit_fields(data: Any, visit: Visit, include_none: bool, allow_frozen: bool) -> Any:
    new = copy.copy(data)
    for field in fields(data):
        old = getattr(data, field.name, _ABSENT)
        value = old if old is _ABSENT else visit(old)
        if value is old or (value is None and not include_none):
            continue
        if data.__dataclass_params__.frozen and not allow_frozen:
            raise InvalidArgumentError(
                f"Field {field.name!r} of the frozen dataclass {type(data).__name__} would change. "
                "Pass allow_frozen=True to get a changed copy, or declare the dataclass without frozen=True."
            )
        object.__setattr__(new, field.name, value)  # a frozen class's own __setattr__ refuses; the copy is ours
    return new


def _is_namedtuple(data: object) -> bool:
    return isinstance(data, tuple) and hasattr(data, "_fields") and hasattr(data, "_make")


def _like_mapping(data: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    if type(data) is dict:
        return new
    if not isinstance(data, dict | UserDict):
        return _construct(data, new)
    # A copy keeps what a constructor call would lose: a default factory, attributes of subclasses.
    result = copy.copy(data)
    for key in data:
        if key in new:
            result[key] = new[key]
        else:
            del result[key]
    return result


def _like_sequence(data: Sequence[Any], items: list[Any]) -> Any:
    if type(data) is list:
        return items
    if _is_namedtuple(data):
        return type(data)._make(items)  # type: ignore[attr-defined]
    if isinstance(data, list):
        result = copy.copy(data)
        result[:] = items
        return result
    if isinstance(data, deque):
        return type(data)(items, data.maxlen)
    return _construct(data, items)


def _construct(data: Any, content: Any) -> Any:
    if type(content) is list and all(map(_is_same, content, data)) and len(content) == len(data):
        return data  # such as an array: a value after all
    try:
        return type(data)(content)
    except TypeError as error:
        raise InvalidTypeError(
            f"A {type(data).__name__} with changed content cannot be made by {type(data).__name__}(content): {error}. "
            "Give the class a method `to(device)`, or use a dict, list, tuple or dataclass."
        ) from error


def _is_same(new: object, old: object) -> bool:
    return new is old


def move_data_to_device(batch: Any, device: Device) -> Any:
    """``batch`` with everything that has a ``.to`` on ``device``; the same object where nothing had to move.

    Containers are copied only if something in them moved; the caller's are never changed. Tensors move without
    blocking, except to ``cpu`` and ``mps``, where reading too early would see unfinished data. A ``.to`` that returns
    nothing is taken to have moved its object in place.
    """
    return batch_mover(device)(batch)


def batch_mover(device: Device) -> Visit:
    """A function that does ``move_data_to_device(batch, device)``, with all decisions about the device already made."""
    return _mover(torch.device(device))


@lru_cache(maxsize=64)
def _mover(device: torch.device) -> Visit:
    where, target = _in_place_test(device)
    non_blocking = device.type not in ("cpu", "mps")

    def move(data: Any) -> Any:
        kind = type(data)
        if kind is Tensor:
            return data if where(data) == target else data.to(device, non_blocking=non_blocking)
        known = by_type.get(kind)
        return move_other(data) if known is None else known(data)

    def move_other(data: Any) -> Any:
        if isinstance(data, Tensor):
            return data.to(device, non_blocking=non_blocking)
        if hasattr(data, "to") and not isinstance(data, type):
            moved = data.to(device)
            return data if moved is None else moved
        return _move_children(data, move)

    by_type: dict[type, Visit] = {dict: _dict_mover(move, where, target)}
    by_type |= dict.fromkeys((list, tuple), _items_mover(move, where, target))
    by_type |= dict.fromkeys((str, int, float, bool, bytes, type(None)), _itself)
    return move


# The loops of these two test tensors themselves: a call per tensor would double the price of a batch in place.


def _dict_mover(move: Visit, where: Visit, target: object) -> Visit:
    def move_dict(data: dict[Any, Any]) -> dict[Any, Any]:
        new = None
        for key, value in data.items():
            if type(value) is Tensor and where(value) == target:
                continue
            moved = move(value)
            if moved is not value:
                new = dict(data) if new is None else new
                new[key] = moved
        return data if new is None else new

    return move_dict


def _items_mover(move: Visit, where: Visit, target: object) -> Visit:
    def move_items(data: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        new = None
        for index, value in enumerate(data):
            if type(value) is Tensor and where(value) == target:
                continue
            moved = move(value)
            if moved is not value:
                new = list(data) if new is None else new
                new[index] = moved
        return data if new is None else type(data)(new)

    return move_items


def _in_place_test(device: torch.device) -> tuple[Visit, object]:
    """What to read from a tensor, and the value that it has if the tensor is on ``device``."""
    if device.type == "cpu":
        return attrgetter("is_cpu"), True
    # "cuda" means the current device, which may be another one at each batch: only `.to` can tell.
    return attrgetter("device"), device if device.index is not None else None


def _itself(data: Any) -> Any:
    return data


def _move_children(data: Any, move: Visit) -> Any:
    changed = False

    def visit(item: Any) -> Any:
        nonlocal changed
        new = move(item)
        changed |= new is not item
        return new

    result = _visit_children(data, visit)
    return result if changed else data


def convert_to_tensors(data: Any, device: Device, contiguous: bool = True) -> Any:
    """``data`` with numbers and numpy arrays as tensors, all of them and the tensors in it contiguous on ``device``.

    Dtypes: bool becomes uint8, which every communication library can reduce; int becomes int64, float torch's default
    dtype, and numpy values keep theirs. A number becomes a tensor without dimensions. With ``contiguous=False`` tensors
    on the device stay the objects they are, whatever their strides.
    """
    device = torch.device(device)
    numpy: Any = sys.modules.get("numpy")  # data can hold its arrays only if the program has imported it
    arrays = () if numpy is None else (numpy.ndarray, numpy.generic)

    def convert(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            moved: Tensor = value.to(device)
            return moved.contiguous() if contiguous else moved
        if arrays and isinstance(value, arrays):
            tensor = torch.as_tensor(numpy.asarray(value), device=device).contiguous()  # torch 2.6 takes no scalars
            return tensor.to(torch.uint8) if tensor.dtype is torch.bool and not value.ndim else tensor
        return torch.tensor(value, dtype=torch.uint8 if isinstance(value, bool) else None, device=device)

    return apply_to_collection(data, (bool, int, float, Tensor, *arrays), convert, allow_frozen=True)


def convert_tensors_to_scalars(data: Any) -> Any:
    """``data`` with every tensor as a Python number.

    Raises:
        InvalidArgumentError: a tensor holds more or less than one element.
    """

    def scalar(tensor: Tensor) -> Any:
        if tensor.numel() != 1:
            raise InvalidArgumentError(
                f"Expected tensors with one element, got one of shape {tuple(tensor.shape)}. "
                "Reduce it first, for example with `.mean()`."
            )
        return tensor.item()

    return apply_to_collection(data, Tensor, scalar, allow_frozen=True)
