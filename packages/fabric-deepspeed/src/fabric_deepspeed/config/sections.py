"""All typed sections in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.activation_checkpointing import ActivationCheckpointingConfig
from fabric_deepspeed.config.aio import AioConfig
from fabric_deepspeed.config.floats import BFloat16Config, Float16Config
from fabric_deepspeed.config.keywords import FLOAT16_PATHS, PATHS
from fabric_deepspeed.config.offload import OptimizerOffloadConfig, ParameterOffloadConfig
from fabric_deepspeed.config.section import Section
from fabric_deepspeed.config.zero import ZeroConfig, understood_at

Own = TypeVar("Own", bound=Section)
_SECTIONS = ("zero_optimization", "aio", "activation_checkpointing", "fp16", "bf16")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed's configuration with checked sections; ``DeepSpeedStrategy(config=...)`` takes it.

    Attributes:
        zero_optimization: how states are split; ``None`` for stage 0.
        aio: how NVMe is used; only with something offloaded to it.
        activation_checkpointing: for models that call ``deepspeed.checkpointing.checkpoint``.
        fp16: only to change how the loss is scaled; whether it is used follows from ``Fabric(precision=...)``.
        bf16: likewise.
        more: DeepSpeed's other keys, such as ``{"gradient_clipping": 1.0}``.
    """

    zero_optimization: ZeroConfig | None = field(default_factory=ZeroConfig)
    aio: AioConfig | None = None
    activation_checkpointing: ActivationCheckpointingConfig | None = None
    fp16: Float16Config | None = None
    bf16: BFloat16Config | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        twice = sorted(set(self.more) & {name for name in _SECTIONS if getattr(self, name) is not None})
        if twice:
            raise InvalidArgumentError(f"DeepSpeedConfig(more=...) repeats {', '.join(twice)}: say it in one place.")

    def document(self) -> dict[str, Any]:
        """DeepSpeed's dictionary: new, of plain values."""
        sections = {name: getattr(self, name) for name in _SECTIONS}
        return {**{n: s.section() for n, s in sections.items() if s is not None}, **self.more}

    @classmethod
    def of_keywords(cls, keywords: Mapping[str, Any]) -> DeepSpeedConfig:
        """What the strategy's arguments ask for, the precision aside; all names of ``DEFAULTS`` have to be there."""
        switched_on = bool(keywords["zero_optimization"])
        zero = _zero(keywords if switched_on else {**keywords, "stage": 0})
        batch = keywords["logging_batch_size_per_gpu"]
        return cls(
            zero_optimization=zero if switched_on else None,
            aio=_of(AioConfig, keywords) if _uses_disk(zero) else None,
            activation_checkpointing=_of(ActivationCheckpointingConfig, keywords),
            more={
                "zero_allow_untested_optimizer": bool(keywords["zero_allow_untested_optimizer"]),
                **({} if batch is None else {"train_micro_batch_size_per_gpu": _batch(batch)}),
            },
        )


def float16_of_keywords(keywords: Mapping[str, Any]) -> Float16Config:
    """The section ``fp16`` that the strategy's arguments ask for."""
    return _of(Float16Config, keywords)


def _zero(keywords: Mapping[str, Any]) -> ZeroConfig:
    stage = ZeroConfig(stage=keywords["stage"]).stage
    known = {name: value for name, value in _named(ZeroConfig, keywords).items() if name in understood_at(stage)}
    optimizer = _of(OptimizerOffloadConfig, keywords) if keywords["offload_optimizer"] else None
    parameters = _of(ParameterOffloadConfig, keywords) if keywords["offload_parameters"] else None
    return ZeroConfig(**{**known, "offload_optimizer": optimizer, "offload_param": parameters})


def _uses_disk(zero: ZeroConfig) -> bool:
    return any(
        offload is not None and offload.device == "nvme" for offload in (zero.offload_optimizer, zero.offload_param)
    )


def _of(kind: type[Own], keywords: Mapping[str, Any]) -> Own:
    return kind.of(_named(kind, keywords))


def _named(kind: type[Section], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that are values of one section, by the names that they have there."""
    tables = (PATHS, FLOAT16_PATHS)
    found = [(name, path) for table in tables for name, paths in table.items() for path in paths]
    values = {path[-1]: keywords[name] for name, path in found if path[:-1] == kind.path}
    if "number_checkpoints" in keywords:
        values["number_checkpoints"] = keywords["number_checkpoints"]
    return values


def _batch(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidArgumentError(
            f"logging_batch_size_per_gpu={size!r}: expected how many samples one process takes at a time, at least 1."
        )
    return size
