"""DeepSpeed for Fabric: ZeRO as a strategy, its precisions, and typed sections of its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.lazy import name_table

if TYPE_CHECKING:  # for type checkers and editors, which cannot read the table
    from fabric_deepspeed.config.activation_checkpointing import (
        ActivationCheckpointingConfig as ActivationCheckpointingConfig,
    )
    from fabric_deepspeed.config.aio import AioConfig as AioConfig
    from fabric_deepspeed.config.floats import BFloat16Config as BFloat16Config
    from fabric_deepspeed.config.floats import Float16Config as Float16Config
    from fabric_deepspeed.config.offload import OptimizerOffloadConfig as OptimizerOffloadConfig
    from fabric_deepspeed.config.offload import ParameterOffloadConfig as ParameterOffloadConfig
    from fabric_deepspeed.config.sections import DeepSpeedConfig as DeepSpeedConfig
    from fabric_deepspeed.config.zero import ZeroConfig as ZeroConfig
    from fabric_deepspeed.precision import DeepSpeedPrecision as DeepSpeedPrecision
    from fabric_deepspeed.strategy import DeepSpeedStrategy as DeepSpeedStrategy

_TABLE = {
    "ActivationCheckpointingConfig": "fabric_deepspeed.config.activation_checkpointing:ActivationCheckpointingConfig",
    "AioConfig": "fabric_deepspeed.config.aio:AioConfig",
    "BFloat16Config": "fabric_deepspeed.config.floats:BFloat16Config",
    "DeepSpeedConfig": "fabric_deepspeed.config.sections:DeepSpeedConfig",
    "DeepSpeedPrecision": "fabric_deepspeed.precision:DeepSpeedPrecision",
    "DeepSpeedStrategy": "fabric_deepspeed.strategy:DeepSpeedStrategy",
    "Float16Config": "fabric_deepspeed.config.floats:Float16Config",
    "OptimizerOffloadConfig": "fabric_deepspeed.config.offload:OptimizerOffloadConfig",
    "ParameterOffloadConfig": "fabric_deepspeed.config.offload:ParameterOffloadConfig",
    "ZeroConfig": "fabric_deepspeed.config.zero:ZeroConfig",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
