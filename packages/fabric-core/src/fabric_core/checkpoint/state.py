"""From the objects a user names to what is stored, and back. Pure functions; nothing here knows files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.checkpoint.safe_types import check_readable
from fabric_core.errors import CheckpointKeyError, InvalidArgumentError, InvalidTypeError
from fabric_core.types import Stateful

if TYPE_CHECKING:
    Filter = Mapping[str, Callable[[str, Any], bool]]


def module_state(module: nn.Module) -> dict[str, Any]:
    """The module's state dict, as it gives it."""
    state: dict[str, Any] = module.state_dict()
    return state


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, as it gives it."""
    return optimizer.state_dict()


def collect_state(
    state: dict[str, Any],
    filter: Filter | None = None,
    *,
    module_state: Callable[[nn.Module], dict[str, Any]] = module_state,
    optimizer_state: Callable[[Optimizer], dict[str, Any]] = optimizer_state,
) -> dict[str, Any]:
    """What to store for ``state``: the state of its modules, optimizers and other stateful objects, the rest as it is.

    Tensors are not copied. Every rank must call it if one of the functions needs all of them.

    Args:
        state: objects by name; only those at the top level are turned into their state.
        filter: for a name, a function of key and value that says which entries to keep. Values that are no dict stay.
        module_state: gives a module's state, for strategies that wrap modules.
        optimizer_state: the same for optimizers.

    Raises:
        InvalidTypeError: something in ``state`` that cannot be stored, as a data loader.
    """
    if not isinstance(state, dict):
        raise InvalidTypeError(
            f"The state to save must be a dict of names to objects, got {type(state).__name__}. "
            'For a single object: {"model": model}.'
        )
    if filter is not None:
        validate_filter(state, filter)
    plain = {}
    for key, value in state.items():
        converted = _plain(value, module_state, optimizer_state)
        if filter is not None and key in filter and isinstance(converted, Mapping):
            converted = _filtered(converted, filter[key])
        plain[key] = converted
    check_readable(plain)
    return plain


def _plain(
    value: Any,
    module_state: Callable[[nn.Module], dict[str, Any]],
    optimizer_state: Callable[[Optimizer], dict[str, Any]],
) -> Any:
    if isinstance(value, nn.Module):
        return module_state(value)
    if isinstance(value, Optimizer):
        return optimizer_state(value)
    return value.state_dict() if is_stateful(value) else value


def is_stateful(value: Any) -> bool:
    """Whether ``value`` is an object that gives its state and takes it back; a class is not."""
    return isinstance(value, Stateful) and not isinstance(value, type)


def _filtered(source: Mapping[str, Any], keep: Callable[[str, Any], bool]) -> dict[str, Any]:
    kept = {key: value for key, value in source.items() if keep(key, value)}
    if isinstance(source, dict) and hasattr(source, "_metadata"):  # version numbers that modules read when loading
        result = type(source)(kept)
        result._metadata = source._metadata  # type: ignore[attr-defined]
        return result
    return kept


def validate_filter(state: dict[str, Any], filter: Any) -> None:
    """Raise unless ``filter`` is a dict of functions for names that ``state`` has.

    Raises:
        InvalidTypeError: not a dict, or a value that is no function.
        InvalidArgumentError: names that are not in ``state``.
    """
    if not isinstance(filter, Mapping):
        raise InvalidTypeError(
            f"filter must be a dict of names in the state to functions (key, value) -> bool, got {filter!r}."
        )
    unknown = [key for key in filter if key not in state]
    if unknown:
        raise InvalidArgumentError(f"filter names {_listed(unknown)}, but the state only has {_listed(state)}.")
    for key, function in filter.items():
        if not callable(function):
            raise InvalidTypeError(f"filter[{key!r}] must be a function (key, value) -> bool, got {function!r}.")


def check_keys(requested: Iterable[str], available: Iterable[str], strict: bool = True) -> None:
    """``CheckpointKeyError`` naming every requested key that is not available; nothing if not ``strict``."""
    available = list(available)
    missing = [key for key in requested if key not in available]
    if not strict or not missing:
        return
    close = {key: difflib.get_close_matches(str(key), map(str, available), 1) for key in missing}
    hints = ", ".join(f"{found[0]!r} for {key!r}" for key, found in close.items() if found)
    raise CheckpointKeyError(
        f"The checkpoint has no {_listed(missing)}; it has {_listed(available) if available else 'nothing'}. "
        + (f"Did you mean {hints}? " if hints else "")
        + "Pass strict=False to load what is there and leave the rest as it is."
    )


def move_state_into(source: dict[str, Any], destination: dict[str, Any], keys: Iterable[str] | None = None) -> None:
    """Take ``keys`` (all by default) out of ``source`` into ``destination``.

    Stateful objects there take the value as their state; other values are replaced, in the caller's dict.
    """
    for key in list(source if keys is None else keys):
        value = source.pop(key)
        if is_stateful(destination.get(key)):
            destination[key].load_state_dict(value)
        else:
            destination[key] = value


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(map(repr, keys))
