"""What safe loading (``weights_only=True``) can read back, told by type before anything is written."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core.checkpoint.tree import SAFE_LEAVES, leaves
from fabric_core.errors import InvalidTypeError
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.warnings import user_stacklevel

_STORAGES: Final = (torch.UntypedStorage, torch.storage.TypedStorage)


def check_readable(plain: dict[str, Any]) -> None:
    """Refuse what is never meant to be stored whole, and warn of what safe loading will refuse.

    ``InvalidTypeError`` for a data loader, and for a module or an optimizer inside a nested container. ``UserWarning``
    on rank 0, once for all places, for other objects: they can be read back only with ``weights_only=False``, unless
    their class is passed to ``torch.serialization.add_safe_globals``, which also silences the warning.
    """
    allowed = _allowed_types()
    doubtful: dict[str, str] = {}
    for place, leaf in leaves(plain, "state"):
        kind = type(leaf)
        if kind in SAFE_LEAVES or kind in allowed or issubclass(kind, _STORAGES):
            continue
        _refuse_live_objects(place, leaf)
        if not isinstance(leaf, torch.Tensor):  # tensor subclasses bring their own rules
            doubtful[place] = f"{kind.__module__}.{kind.__qualname__}"
    if doubtful:
        shown = "; ".join(f"{place} is a {kind}" for place, kind in list(doubtful.items())[:5])
        more = f"; and {len(doubtful) - 5} more" if len(doubtful) > 5 else ""
        rank_zero_warn(
            f"This checkpoint will be refused by safe loading: {shown}{more}. Convert to plain numbers, text, "
            "containers or tensors; or allow the class with torch.serialization.add_safe_globals([...]), in the "
            "program that loads too; or load with weights_only=False, which runs any code that the file holds.",
            stacklevel=user_stacklevel(),
        )


def _refuse_live_objects(place: str, leaf: Any) -> None:
    if isinstance(leaf, DataLoader):
        raise InvalidTypeError(
            f"{place} is a {type(leaf).__name__} without state_dict() and load_state_dict(): there is nothing of it to "
            "store, and a checkpoint that held the object itself could not be opened safely. Leave it out, or store "
            "what you need of it, such as the epoch and the batch number."
        )
    if isinstance(leaf, nn.Module | Optimizer):
        raise InvalidTypeError(
            f"{place} is a {type(leaf).__name__} inside another container. Only objects at the top level of the state "
            f"are stored as their state: move it there, or put its state_dict() in its place."
        )


def _allowed_types() -> set[Any]:
    entries = torch.serialization.get_safe_globals()
    return {entry[0] if isinstance(entry, tuple) else entry for entry in entries}
