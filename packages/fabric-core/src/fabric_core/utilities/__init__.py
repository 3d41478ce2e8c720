"""Helpers under the names that programs import: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "AttributeDict": "fabric_core.attribute_dict:AttributeDict",
    "apply_func": "fabric_core.utilities.apply_func",
    "cloud_io": "fabric_core.utilities.cloud_io",
    "data": "fabric_core.utilities.data",
    "disable_possible_user_warnings": "fabric_core.warnings:disable_possible_user_warnings",
    "exceptions": "fabric_core.utilities.exceptions",
    "move_data_to_device": "fabric_core.collections:move_data_to_device",
    "rank_zero": "fabric_core.utilities.rank_zero",
    "rank_zero_deprecation": "fabric_core.rank_zero:rank_zero_deprecation",
    "rank_zero_info": "fabric_core.rank_zero:rank_zero_info",
    "rank_zero_only": "fabric_core.rank_zero:rank_zero_only",
    "rank_zero_warn": "fabric_core.rank_zero:rank_zero_warn",
    "seed": "fabric_core.utilities.seed",
    "suggested_max_num_workers": "fabric_core.data.workers:suggested_max_num_workers",
    "types": "fabric_core.utilities.types",
    "warnings": "fabric_core.utilities.warnings",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
