"""Data loading: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "AttributeDict": "fabric_core.attribute_dict:AttributeDict",
    "DistributedSamplerWrapper": "fabric_core.data.sampler:DistributedSamplerWrapper",
    "has_iterable_dataset": "fabric_core.data.lengths:has_iterable_dataset",
    "has_len": "fabric_core.data.lengths:has_len",
    "sized_len": "fabric_core.data.lengths:sized_len",
    "suggested_max_num_workers": "fabric_core.data.workers:suggested_max_num_workers",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
