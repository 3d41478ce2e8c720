"""The plugins that core itself provides, as text. Nothing here is imported until it is chosen.

They take the same path as everybody's after the look-up, need no scan, and are there with autoload disabled and in
frozen applications. Two names with one target are aliases of each other.
"""

from __future__ import annotations

from typing import Final

TABLE: Final[dict[str, dict[str, str]]] = {
    "accelerator": {
        "cpu": "fabric_core.accelerators.cpu:CPUAccelerator",
        "mps": "fabric_core.accelerators.mps:MPSAccelerator",
        "generic": "fabric_core.accelerators.generic:GenericAccelerator",
    },
    "strategy": {
        "single_device": "fabric_core.strategies.single_device:SingleDeviceStrategy",
        "ddp": "fabric_core.strategies.ddp:DDPStrategy",
        "ddp_spawn": "fabric_core.strategies.ddp:DDPStrategy.spawn",
        "ddp_fork": "fabric_core.strategies.ddp:DDPStrategy.fork",
        "ddp_notebook": "fabric_core.strategies.ddp:DDPStrategy.fork",
        "ddp_find_unused_parameters_true": "fabric_core.strategies.ddp:DDPStrategy.find_unused_parameters_true",
        "fsdp": "fabric_core.strategies.fsdp:FSDPStrategy",
        "fsdp2": "fabric_core.strategies.fsdp:FSDPStrategy",
        "fsdp_cpu_offload": "fabric_core.strategies.fsdp:FSDPStrategy.with_cpu_offload",
        "hsdp": "fabric_core.strategies.fsdp:FSDPStrategy.hybrid",
    },
    "precision": {
        "32-true": "fabric_core.abc.precision:Precision",
        "64-true": "fabric_core.precision.double:DoublePrecision",
        "16-true": "fabric_core.precision.half:HalfPrecision.float16",
        "bf16-true": "fabric_core.precision.half:HalfPrecision.bfloat16",
        "16-mixed": "fabric_core.precision.mixed:MixedPrecision.float16",
        "bf16-mixed": "fabric_core.precision.mixed:MixedPrecision.bfloat16",
        "fsdp.32-true": "fabric_core.precision.sharded:FSDPPrecision",
        "fsdp.16-true": "fabric_core.precision.sharded:FSDPPrecision.float16",
        "fsdp.bf16-true": "fabric_core.precision.sharded:FSDPPrecision.bfloat16",
        "fsdp.16-mixed": "fabric_core.precision.sharded:FSDPPrecision.mixed_float16",
        "fsdp.bf16-mixed": "fabric_core.precision.sharded:FSDPPrecision.mixed_bfloat16",
        "model_parallel.32-true": "fabric_core.abc.precision:Precision",
        "model_parallel.16-true": "fabric_core.precision.half:HalfPrecision.float16",
        "model_parallel.bf16-true": "fabric_core.precision.half:HalfPrecision.bfloat16",
        "model_parallel.16-mixed": "fabric_core.precision.sharded:sharded_float16",
        "model_parallel.bf16-mixed": "fabric_core.precision.mixed:MixedPrecision.bfloat16",
    },
    "environment": {
        "default": "fabric_core.environments.default:LightningEnvironment",
        "torchelastic": "fabric_core.environments.torchelastic:TorchElasticEnvironment",
    },
    "checkpoint_io": {
        "torch": "fabric_core.checkpoint.torch_io:TorchCheckpointIO",
        "async": "fabric_core.checkpoint.async_io:AsyncCheckpointIO",
    },
    "logger": {},
    "command": {
        "run": "fabric_core.cli.run:run",
        "plugins": "fabric_core.cli.plugins:plugins",
        "explain": "fabric_core.cli.explain:explain",
        "checkpoint": "fabric_core.cli.checkpoint:checkpoint",
        "consolidate": "fabric_core.cli.consolidate:consolidate",
    },
}

HOOKS: Final[dict[str, str]] = {
    "fabric-core.accelerators": "fabric_core.accelerators.hooks",
    "fabric-core.environments": "fabric_core.environments.hooks",
}
"""Core's own hook modules, registered before any plugin's."""
