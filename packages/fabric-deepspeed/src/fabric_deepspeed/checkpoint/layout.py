"""What a checkpoint of DeepSpeed looks like from outside, and what people pass in its place. Imports no torch.

::

    checkpoint/
        checkpoint/     the tag: a folder with the files of all ranks
            mp_rank_00_model_states.pt                      stages 0 to 2: the module, written by one rank
            zero_pp_rank_0_mp_rank_00_model_states.pt       stage 3: rank 0's part of it
            zero_pp_rank_0_mp_rank_00_optim_states.pt       rank 0's part of the optimizer and its float32 weights
        latest          the tag's name
        zero_to_fp32.py DeepSpeed's own program for consolidation
"""

from __future__ import annotations

import os
import re
from typing import Final

from fabric_core.checkpoint.sharded.layout import FolderLayout, find_folder
from fabric_core.errors import CheckpointError

TAG: Final = "checkpoint"
"""The tag of what Fabric and Lightning write. DeepSpeed's own default is ``global_stepN``."""
LATEST: Final = "latest"
MODEL_SUFFIX: Final = "model_states.pt"
OPTIMIZER_SUFFIX: Final = "optim_states.pt"
_OURS: Final = frozenset({TAG, LATEST, "zero_to_fp32.py", "zero_to_torch.py"})
_RANK: Final = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_?(?:model|optim)_states\.pt$")

LAYOUT: Final = FolderLayout(marker=LATEST, held=LATEST, is_part=_OURS.__contains__)
"""How a save replaces the folder. Other tags in it, and other files, stay."""


def claims(folder: str) -> bool:
    """Whether a local folder is one of DeepSpeed's, or so close to one that its reader should say what is wrong."""
    tag = _tag_of(folder)
    return _has_states(folder) or bool(_tags_in(folder)) or (tag is not None and _has_states(os.path.join(folder, tag)))


def tag_folder(path: str) -> str:
    """The folder with the files of the latest tag in the checkpoint ``path``.

    Raises:
        FileNotFoundError: ``path`` is no such checkpoint; the message says what it is, and what to pass.
        CheckpointError: the tag's name is none.
    """
    folder = find_folder(path, LAYOUT)
    if folder is None or not os.path.isdir(folder):
        raise FileNotFoundError(_no_folder(path))
    tag = _tag_of(folder)
    if tag is None:
        raise FileNotFoundError(_no_latest(folder))
    if os.path.isabs(tag) or os.pardir in tag.split(os.sep):
        raise CheckpointError(f"{os.path.join(folder, LATEST)!r} names {tag!r}, which is no folder inside this one.")
    inside = os.path.join(folder, tag)
    if not _has_states(inside):
        tags = _tags_in(folder)
        hint = f" These have: {', '.join(map(repr, tags))}; write one of them into the file." if tags else ""
        raise FileNotFoundError(
            f"{folder!r} holds no checkpoint of DeepSpeed: {LATEST!r} names {tag!r}, where no file *{MODEL_SUFFIX} "
            f"is.{hint}"
        )
    return inside


def mistaken_file(path: str) -> str | None:
    """The checkpoint that a file belongs to, by its place and name; ``None`` if it belongs to none."""
    if not os.path.isfile(path):
        return None
    folder, name = os.path.split(os.path.abspath(path))
    if name.endswith((MODEL_SUFFIX, OPTIMIZER_SUFFIX)):
        return os.path.dirname(folder)
    return folder if name in _OURS and _tag_of(folder) is not None else None


def rank_of(name: str) -> int | None:
    """Whose file it is; ``None`` for one that a single rank writes for all."""
    match = _RANK.search(name)
    return None if match is None else int(match[1])


def _no_folder(path: str) -> str:
    owner = mistaken_file(path)
    if owner is not None:
        return f"{path!r} is one file of the checkpoint {owner!r}: pass that folder."
    if os.path.exists(path):
        return f"{path!r} is a file, and no checkpoint of DeepSpeed, which is a folder."
    return f"There is no checkpoint at {path!r} (from {os.getcwd()!r})."


def _no_latest(folder: str) -> str:
    parent = os.path.dirname(folder)
    if _has_states(folder) and _tag_of(parent) is not None:
        return f"{folder!r} is the folder {os.path.basename(folder)!r} inside the checkpoint {parent!r}: pass that one."
    tags = [os.path.basename(folder)] if _has_states(folder) else _tags_in(folder)
    place = parent if _has_states(folder) else folder
    if tags:
        return (
            f"{place!r} has no file {LATEST!r}, which is written last: the save did not come to its end, or the file "
            f"was not copied along. If you know that {', '.join(map(repr, tags))} is complete, write its name into "
            f"{os.path.join(place, LATEST)!r}, and pass {place!r}."
        )
    return f"{folder!r} holds no checkpoint of DeepSpeed: it has no file {LATEST!r}."


def _tag_of(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
            return file.read(4096).strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _has_states(folder: str) -> bool:
    try:
        return any(name.endswith(MODEL_SUFFIX) for name in os.listdir(folder))
    except OSError:
        return False


def _tags_in(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _has_states(entry.path))
    except OSError:
        return []
