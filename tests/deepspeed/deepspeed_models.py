"""DeepSpeed's own reading of a configuration."""

from __future__ import annotations

import json
import logging

from fabric_deepspeed.backend import load
from fabric_deepspeed.config.document import assemble, finalize
from fabric_deepspeed.config.keywords import DEFAULTS


def assembled(config=None, **typed):
    """What the strategy's constructor makes of ``config`` and the arguments typed."""
    return assemble(config, {**DEFAULTS, **typed}, frozenset(typed))


def finalized(config=None, precision="32-true", **typed):
    """The same, ready for DeepSpeed."""
    keywords = {**DEFAULTS, **typed}
    return finalize(assemble(config, keywords, frozenset(typed)), keywords, frozenset(typed), precision=precision)


def reading(document):
    """DeepSpeed's configuration object made from a dictionary, as plain values, and the warnings that it logged.

    Run it in a worker: DeepSpeed is imported.
    """
    load("cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        config = DeepSpeedConfig(json.loads(json.dumps(document)))
    finally:
        logger.removeHandler(handler)
    values = {
        "zero_optimization": config.zero_config.model_dump(mode="json", by_alias=True),
        "fp16": config.float16_config.model_dump(),
        "bf16": config.bfloat16_config.model_dump(),
        "aio": dict(config.aio_config),
        "activation_checkpointing": dict(vars(config.activation_checkpointing_config)),
        "train_micro_batch_size_per_gpu": config.train_micro_batch_size_per_gpu,
        "gradient_clipping": config.gradient_clipping,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "zero_allow_untested_optimizer": config.zero_allow_untested_optimizer,
        "zero_force_ds_cpu_optimizer": config.zero_force_ds_cpu_optimizer,
    }
    return values, [record.getMessage() for record in records]
