"""Loggers."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "Logger": "fabric_core.abc.logger:Logger",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
