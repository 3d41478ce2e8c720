"""Categories of warnings: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "LightningDeprecationWarning": "fabric_core.warnings:LightningDeprecationWarning",
    "PossibleUserWarning": "fabric_core.warnings:PossibleUserWarning",
    "disable_possible_user_warnings": "fabric_core.warnings:disable_possible_user_warnings",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
