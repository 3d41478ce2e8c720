"""Seeding: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "reset_seed": "fabric_core.seeding:reset_seed",
    "seed_everything": "fabric_core.seeding:seed_everything",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
