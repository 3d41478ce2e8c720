"""What a sharded checkpoint looks like from outside: a folder with ``.metadata`` in it, which DCP reads too.

::

    checkpoint/
        __0_0.distcp    what rank 0 wrote: tensors and plain values, one torch.save after the other
        __1_0.distcp    rank 1
        .metadata       which piece of which tensor is where (a pickle of DCP's classes)
        meta.pt         everything that is no module and no optimizer
        manifest.json   sizes and hashes of the files above

Lightning writes the first four, plain DCP the first three; both count. In a store, the files' names also carry the
name of the save that wrote them, because a store cannot rename a folder (see ``remote_draft``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fabric_core.checkpoint.durable import draft_prefix
from fabric_core.checkpoint.paths import is_http, is_remote, open_filesystem, resolve

if TYPE_CHECKING:
    from fabric_core.types import Path

METADATA: Final = ".metadata"
EXTRAS: Final = "meta.pt"
MANIFEST: Final = "manifest.json"
DATA_SUFFIX: Final = ".distcp"
GENERATION: Final = r"[0-9a-f]{16}"
"""The name of a save, as it occurs in the names of files in stores."""
PREVIOUS_SUFFIX: Final = ".previous"
"""How the name of a checkpoint ends that was moved aside, and whose successor has not taken its place yet."""
_FILES: Final = re.compile(
    rf"__\d+(_\d+)?(\.{GENERATION})?\.(distcp|metadata)|\.metadata(\.{GENERATION}|\.tmp)?|meta(\.{GENERATION})?\.pt"
    rf"|manifest\.json|\.manifest\.json\.{GENERATION}\.partial"
)


def is_part(name: str) -> bool:
    """Whether a file of that name in the folder of a checkpoint belongs to it, and goes when it is replaced."""
    return _FILES.fullmatch(name) is not None


@dataclass(frozen=True)
class FolderLayout:
    """What tells a checkpoint that is a folder from any other folder.

    Attributes:
        marker: a file without which the folder is no checkpoint. Of a folder that is removed, it goes first, so that
            nothing takes what is left for one.
        held: the file that is in a draft from the start, empty, for its writers to lock. It gets its content at the
            very end, and may be the marker.
        is_part: whether a file or folder of that name belongs to the checkpoint, and goes when it is replaced. All
            others are somebody's own and stay.
    """

    marker: str
    held: str
    is_part: Callable[[str], bool]

    def is_in(self, folder: str) -> bool:
        """Whether the local folder holds a checkpoint of this kind."""
        return os.path.isfile(os.path.join(folder, self.marker))


SHARDED: Final = FolderLayout(METADATA, MANIFEST, is_part)
"""What this module's text describes."""


def is_sharded(path: Path) -> bool:
    """Whether a folder or URL holds a sharded checkpoint: ours, Lightning's or plain DCP's. Any rank may call it."""
    if is_http(path):
        return False
    if is_remote(path):
        return _is_sharded_remote(path)
    folder = find_folder(path)
    return folder is not None and SHARDED.is_in(folder)


def _is_sharded_remote(path: Path) -> bool:
    filesystem, inside = open_filesystem(path)
    filesystem.invalidate_cache(inside)
    return any(filesystem.exists(f"{inside.rstrip('/')}/{name}") for name in (MANIFEST, METADATA))


def find_folder(path: Path, layout: FolderLayout = SHARDED) -> str | None:
    """The local folder that holds the checkpoint ``path``: itself, or where an interrupted replacement left it.

    Where folders cannot be exchanged in one step, a replacement moves the old one aside, then the new one into place.
    If it died in between, nothing is at ``path``, and the old one counts; of several, the newest. ``None`` if there is
    no folder. What is at ``path`` itself need not be a checkpoint.
    """
    target = os.path.realpath(resolve(path))
    if os.path.lexists(target):
        return target if os.path.isdir(target) else None
    return next(filter(layout.is_in, moved_aside(target)), None)


def file_aside(path: Path) -> str | None:
    """Where an interrupted replacement left the local file ``path``; ``None`` if something is there, or no file is."""
    target = os.path.realpath(resolve(path))
    return None if os.path.lexists(target) else next(filter(os.path.isfile, moved_aside(target)), None)


def moved_aside(target: str) -> list[str]:
    """What once was at ``target`` and was moved aside for a successor; the one that was changed last comes first."""
    return sorted(siblings(target, PREVIOUS_SUFFIX), key=_changed, reverse=True)


def _changed(path: str) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns
    except OSError:  # removed meanwhile
        return 0


def siblings(target: str, suffix: str) -> list[str]:
    """Paths beside ``target`` with the names that drafts of it have, ending in ``suffix``."""
    folder = os.path.dirname(target)
    pattern = re.compile(re.escape(draft_prefix(target)) + GENERATION + re.escape(suffix))
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [os.path.join(folder, name) for name in sorted(names) if pattern.fullmatch(name)]
