"""Cluster environments: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "ClusterEnvironment": "fabric_core.abc.environment:ClusterEnvironment",
    "LightningEnvironment": "fabric_core.environments.default:LightningEnvironment",
    "TorchElasticEnvironment": "fabric_core.environments.torchelastic:TorchElasticEnvironment",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
