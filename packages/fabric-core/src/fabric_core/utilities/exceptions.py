"""Errors under the name that programs import: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "MisconfigurationException": "fabric_core.errors:MisconfigurationException",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
