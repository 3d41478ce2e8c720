"""The strategy's arguments that concern DeepSpeed's dictionary: their defaults, and the keys that each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

Path: TypeAlias = tuple[str, ...]
"""Keys from the top of the dictionary downwards."""

DEFAULTS: Final[Mapping[str, Any]] = {
    "zero_optimization": True,
    "stage": 2,
    "offload_optimizer": False,
    "offload_parameters": False,
    "offload_params_device": "cpu",
    "nvme_path": "/local_nvme",
    "params_buffer_count": 5,
    "params_buffer_size": 100_000_000,
    "max_in_cpu": 1_000_000_000,
    "offload_optimizer_device": "cpu",
    "optimizer_buffer_count": 4,
    "block_size": 1048576,
    "queue_depth": 8,
    "single_submit": False,
    "overlap_events": True,
    "thread_count": 1,
    "pin_memory": False,
    "sub_group_size": 1_000_000_000_000,
    "contiguous_gradients": True,
    "overlap_comm": True,
    "allgather_partitions": True,
    "reduce_scatter": True,
    "allgather_bucket_size": 200_000_000,
    "reduce_bucket_size": 200_000_000,
    "zero_allow_untested_optimizer": True,
    "logging_batch_size_per_gpu": None,
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "partition_activations": False,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "synchronize_checkpoint_boundary": False,
}
"""Argument to documented default. The names are all that ``assemble`` and ``finalize`` look at."""

_ZERO: Final = "zero_optimization"
_OPTIMIZER: Final = (_ZERO, "offload_optimizer")
_PARAMETERS: Final = (_ZERO, "offload_param")

SWITCHES: Final[Mapping[str, tuple[Path, ...]]] = {
    "zero_optimization": ((_ZERO, "stage"),),
    "offload_optimizer": ((*_OPTIMIZER, "device"), (*_OPTIMIZER, "nvme_path")),
    "offload_parameters": ((*_PARAMETERS, "device"), (*_PARAMETERS, "nvme_path")),
}
"""Arguments that are no value in the dictionary but make a section of it; the keys that come with the section."""

PATHS: Final[Mapping[str, tuple[Path, ...]]] = {
    "stage": ((_ZERO, "stage"),),
    "offload_params_device": ((*_PARAMETERS, "device"),),
    "offload_optimizer_device": ((*_OPTIMIZER, "device"),),
    "nvme_path": ((*_OPTIMIZER, "nvme_path"), (*_PARAMETERS, "nvme_path")),
    "pin_memory": ((*_OPTIMIZER, "pin_memory"), (*_PARAMETERS, "pin_memory")),
    "params_buffer_count": ((*_PARAMETERS, "buffer_count"),),
    "params_buffer_size": ((*_PARAMETERS, "buffer_size"),),
    "max_in_cpu": ((*_PARAMETERS, "max_in_cpu"),),
    "optimizer_buffer_count": ((*_OPTIMIZER, "buffer_count"),),
    "sub_group_size": ((_ZERO, "sub_group_size"),),
    "contiguous_gradients": ((_ZERO, "contiguous_gradients"),),
    "overlap_comm": ((_ZERO, "overlap_comm"),),
    "allgather_partitions": ((_ZERO, "allgather_partitions"),),
    "reduce_scatter": ((_ZERO, "reduce_scatter"),),
    "allgather_bucket_size": ((_ZERO, "allgather_bucket_size"),),
    "reduce_bucket_size": ((_ZERO, "reduce_bucket_size"),),
    "block_size": (("aio", "block_size"),),
    "queue_depth": (("aio", "queue_depth"),),
    "single_submit": (("aio", "single_submit"),),
    "overlap_events": (("aio", "overlap_events"),),
    "thread_count": (("aio", "intra_op_parallelism"),),
    "partition_activations": (("activation_checkpointing", "partition_activations"),),
    "cpu_checkpointing": (("activation_checkpointing", "cpu_checkpointing"),),
    "contiguous_memory_optimization": (("activation_checkpointing", "contiguous_memory_optimization"),),
    "synchronize_checkpoint_boundary": (("activation_checkpointing", "synchronize_checkpoint_boundary"),),
    "zero_allow_untested_optimizer": (("zero_allow_untested_optimizer",),),
    "logging_batch_size_per_gpu": (("train_micro_batch_size_per_gpu",),),
}
"""Arguments that are values in the dictionary, whatever the precision."""

FLOAT16_PATHS: Final[Mapping[str, tuple[Path, ...]]] = {
    "loss_scale": (("fp16", "loss_scale"),),
    "initial_scale_power": (("fp16", "initial_scale_power"),),
    "loss_scale_window": (("fp16", "loss_scale_window"),),
    "hysteresis": (("fp16", "hysteresis"),),
    "min_loss_scale": (("fp16", "min_loss_scale"),),
}
"""Arguments that are values in the dictionary where the precision is one of float16."""

_NAMES: Final = {path: name for table in (PATHS, FLOAT16_PATHS) for name, paths in table.items() for path in paths}


def dotted(path: Path) -> str:
    """A key of the dictionary in words, with the argument that stands for it where the names differ."""
    name = _NAMES.get(path, path[-1])
    return ".".join(path) + ("" if name == path[-1] else f" (argument {name})")
