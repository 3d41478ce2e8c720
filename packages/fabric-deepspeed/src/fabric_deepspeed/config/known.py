"""The names that DeepSpeed's configuration has at its top: DeepSpeed ignores every other one without a word."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from fabric_core.rank_zero import rank_zero_warn
from fabric_core.warnings import user_stacklevel

_KNOWN: Final = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "keep_in_fp32_modules",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "quantize_training",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
_ALIKE: Final = 0.85


def warn_of_slips(document: Mapping[str, Any], words: str) -> None:
    """Warn on rank 0 of each top key that DeepSpeed does not know and that is nearly one of its own."""
    for key in document:
        meant = [] if key in _KNOWN else get_close_matches(str(key), _KNOWN, n=1, cutoff=_ALIKE)
        if meant:
            rank_zero_warn(
                f"{words} has the key {key!r}, which DeepSpeed ignores. Did you mean {meant[0]!r}?",
                stacklevel=user_stacklevel("fabric_deepspeed"),
            )
