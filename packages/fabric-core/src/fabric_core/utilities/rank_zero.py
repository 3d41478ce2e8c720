"""Output from one rank only: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "LightningDeprecationWarning": "fabric_core.warnings:LightningDeprecationWarning",
    "WarningCache": "fabric_core.rank_zero:WarningCache",
    "rank_prefixed_message": "fabric_core.rank_zero:rank_prefixed_message",
    "rank_zero_debug": "fabric_core.rank_zero:rank_zero_debug",
    "rank_zero_deprecation": "fabric_core.rank_zero:rank_zero_deprecation",
    "rank_zero_info": "fabric_core.rank_zero:rank_zero_info",
    "rank_zero_only": "fabric_core.rank_zero:rank_zero_only",
    "rank_zero_warn": "fabric_core.rank_zero:rank_zero_warn",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
