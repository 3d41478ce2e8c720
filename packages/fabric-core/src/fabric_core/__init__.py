"""Fabric: take a hand-written PyTorch loop from a laptop CPU to many accelerators, with backends as plugins.

Importing this package imports nothing else, not even torch; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.fabric import Fabric as Fabric
    from fabric_core.seeding import seed_everything as seed_everything
    from fabric_core.wrappers.unwrap import is_wrapped as is_wrapped

_HOME = {
    "Fabric": "fabric_core.fabric",
    "is_wrapped": "fabric_core.wrappers.unwrap",
    "seed_everything": "fabric_core.seeding",
}
__all__ = ["Fabric", "is_wrapped", "seed_everything"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
