"""Reading one of DeepSpeed's files: mapped, not loaded, and without running anything that is in it.

The files hold a few small objects of DeepSpeed. Safe reading puts plain stand-ins in their places, by their names, so
that DeepSpeed need not even be imported.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, Final

import torch

from fabric_core.checkpoint.lazy import is_archive
from fabric_core.errors import CheckpointError, FabricError, UnsafeCheckpointError


class Scaler:
    """Stands for DeepSpeed's loss scaler. Its attributes are those that the scaler had."""


class DynamicScaler(Scaler):
    """The one that changes its scale."""


class Address:
    """Stands for where a parameter lies in a rank's flat memory. It is not always right, and nothing here uses it."""


_STAGES: Final = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _member(owner: object, name: str) -> int:
    """In place of ``getattr``, by which Python 3.11.0 to 3.11.3 pickle a member of an enumeration: looks up nothing."""
    if owner is not int or name not in _STAGES:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {owner!r} and {name!r} is refused")
    return _STAGES[name]


_STAND_INS: Final[list[Callable[..., Any] | tuple[Callable[..., Any], str]]] = [
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_member, "builtins.getattr"),
    (_member, "__builtin__.getattr"),
]


def read_file(path: str, weights_only: bool | None) -> dict[str, Any]:
    """What the file holds; its tensors are windows on it, on the CPU.

    Args:
        path: a local file.
        weights_only: ``False`` runs code from it, and imports what it names.

    Raises:
        UnsafeCheckpointError: it holds objects of classes that are not known to be harmless.
        CheckpointError: it is damaged.
    """
    safe = weights_only is not False
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", mmap=is_archive(path), weights_only=safe)
    except (FabricError, OSError, MemoryError, Warning):  # a warning that is an error says nothing of the file
        raise
    except Exception as error:
        refused = _refused_names(path, error) if safe and isinstance(error, pickle.UnpicklingError) else ""
        if not refused:
            raise CheckpointError(f"{path!r} cannot be read, it may be damaged: {error}") from error
        raise UnsafeCheckpointError(
            f"{os.path.basename(path)!r} was NOT loaded: it holds {refused}, and building these runs code that whoever "
            f"wrote {path!r} has chosen.\n"
            "If you know these names and trust them: torch.serialization.add_safe_globals([...]), then load again.\n"
            "If you trust the origin of the whole checkpoint: pass weights_only=False."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path!r} holds a {type(content).__name__}: it is no file of a checkpoint of DeepSpeed.")
    return content


def _refused_names(path: str, error: Exception) -> str:
    """What safe reading stumbles over in the file; empty if that is not the problem."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an old format, whose names torch does not list; the error itself is on its way
        names = []
    return ", ".join(names) or ("objects of unknown classes" if "GLOBAL" in str(error) else "")
