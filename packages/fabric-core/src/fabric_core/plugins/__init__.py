"""What can be passed as ``Fabric(plugins=...)``: a name table, without code."""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "AsyncCheckpointIO": "fabric_core.checkpoint.async_io:AsyncCheckpointIO",
    "CheckpointIO": "fabric_core.abc.checkpoint:CheckpointIO",
    "ClusterEnvironment": "fabric_core.abc.environment:ClusterEnvironment",
    "DoublePrecision": "fabric_core.precision.double:DoublePrecision",
    "FSDPPrecision": "fabric_core.precision.sharded:FSDPPrecision",
    "HalfPrecision": "fabric_core.precision.half:HalfPrecision",
    "LightningEnvironment": "fabric_core.environments.default:LightningEnvironment",
    "MixedPrecision": "fabric_core.precision.mixed:MixedPrecision",
    "Precision": "fabric_core.abc.precision:Precision",
    "TorchCheckpointIO": "fabric_core.checkpoint.torch_io:TorchCheckpointIO",
    "TorchElasticEnvironment": "fabric_core.environments.torchelastic:TorchElasticEnvironment",
    "environments": "fabric_core.plugins.environments",
    "io": "fabric_core.plugins.io",
    "precision": "fabric_core.plugins.precision",
}
__getattr__, __dir__ = name_table(__name__, _TABLE, other_distributions=True)
__all__ = sorted(_TABLE)
