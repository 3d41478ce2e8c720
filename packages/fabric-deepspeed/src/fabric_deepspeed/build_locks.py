"""Locks that interrupted builds of native extensions leave behind: every later run waits for them in silence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from fabric_deepspeed.settings import CACHE_HOME, EXTENSIONS_DIR

QUIET_SECONDS: Final = 600.0
"""A build in whose folder nothing has changed for so long has ended. One source file compiles in less."""


def extension_folder() -> Path:
    """Where torch builds native extensions, for this process."""
    given = EXTENSIONS_DIR.text()
    if given:
        return Path(given)
    caches = CACHE_HOME.text() or "~/.cache"  # where torch puts it; asking torch would import torch
    return Path(caches).expanduser() / "torch_extensions"


def abandoned_locks(now: float | None = None) -> list[Path]:
    """Lock files of builds that nobody seems to work on any more, oldest first. Changes nothing."""
    now = time.time() if now is None else now
    root = extension_folder()
    locks = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}, key=_changed)
    return [lock for lock in locks if now - max(map(_changed, lock.parent.iterdir()), default=now) > QUIET_SECONDS]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone meanwhile: the build goes on
        return float("inf")
