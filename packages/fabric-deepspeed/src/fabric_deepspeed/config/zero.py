"""How ZeRO splits the model's states over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.keywords import Path
from fabric_deepspeed.config.offload import OptimizerOffloadConfig, ParameterOffloadConfig
from fabric_deepspeed.config.section import STAGES, Section, check, plain, switch, whole

Own = TypeVar("Own", bound="ZeroConfig")
_DIVIDED, _LOW, _FULL = (1, 2, 3), (1, 2), (3,)


def _stage(value: Any) -> int:
    if isinstance(value, bool) or value not in STAGES:
        raise ValueError(value)
    return int(value)


def _offload(kind: type[Section]) -> Any:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(value)
        return value

    return read


@dataclass(frozen=True)
class ZeroConfig(Section):
    """The section ``zero_optimization``; only what the stage looks at gets into it.

    ``InvalidArgumentError`` for a field that has been given a value and means nothing at the stage.

    Attributes:
        stage: 0 splits nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
        contiguous_gradients: gradients are written into one buffer as backward makes them. Stages 1 to 3.
        overlap_comm: gradients are reduced while backward goes on. Stages 1 to 3.
        reduce_scatter: each rank gets its part of the averaged gradients only. Stages 1 to 3.
        reduce_bucket_size: elements reduced at a time. Stages 1 to 3.
        allgather_partitions: one collective gathers updated parameters, instead of a broadcast from each rank.
            Stages 1, 2.
        allgather_bucket_size: elements gathered at a time. Stages 1, 2.
        round_robin_gradients: ranks share the copying of gradients to host memory. Stages 1, 2.
        sub_group_size: elements that the optimizer updates at a time. Stage 3.
        stage3_prefetch_bucket_size: elements gathered ahead of their use. Stage 3, as those that follow.
        stage3_param_persistence_threshold: parameters with fewer elements are not split.
        stage3_max_live_parameters: elements that may be gathered at a time.
        stage3_max_reuse_distance: parameters that are used again within so many elements stay gathered.
        stage3_gather_16bit_weights_on_model_save: allow ``engine.save_16bit_model``.
        offload_optimizer: optimizer states in host memory or on NVMe. Stages 1 to 3; NVMe at stage 3.
        offload_param: parameters in host memory or on NVMe. Stage 3.
    """

    path: ClassVar[Path] = ("zero_optimization",)
    required: ClassVar[tuple[str, ...]] = ("stage",)

    stage: int = field(default=2, metadata=check("0, 1, 2 or 3", _stage))
    contiguous_gradients: bool = switch(True, _DIVIDED)
    overlap_comm: bool = switch(True, _DIVIDED)
    reduce_scatter: bool = switch(True, _DIVIDED)
    reduce_bucket_size: int = whole(200_000_000, 1, _DIVIDED)
    allgather_partitions: bool = switch(True, _LOW)
    allgather_bucket_size: int = whole(200_000_000, 1, _LOW)
    round_robin_gradients: bool | None = switch(None, _LOW)
    sub_group_size: int = whole(1_000_000_000_000, 1, _FULL)
    stage3_prefetch_bucket_size: int | None = whole(None, 0, _FULL)
    stage3_param_persistence_threshold: int | None = whole(None, 0, _FULL)
    stage3_max_live_parameters: int | None = whole(None, 0, _FULL)
    stage3_max_reuse_distance: int | None = whole(None, 0, _FULL)
    stage3_gather_16bit_weights_on_model_save: bool | None = switch(None, _FULL)
    offload_optimizer: OptimizerOffloadConfig | None = field(
        default=None, metadata=check("an OptimizerOffloadConfig", _offload(OptimizerOffloadConfig))
    )
    offload_param: ParameterOffloadConfig | None = field(
        default=None, metadata=check("a ParameterOffloadConfig", _offload(ParameterOffloadConfig))
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_offloads()
        understood = understood_at(self.stage)
        for one in fields(self):
            if one.name not in understood and getattr(self, one.name) not in (None, one.default):
                raise InvalidArgumentError(
                    f"{self.place(one.name)}={getattr(self, one.name)!r} means nothing at stage {self.stage}: leave it "
                    f"out, or use stage {' or '.join(map(str, one.metadata['stages']))}."
                )

    def _check_offloads(self) -> None:
        if self.offload_param is not None and self.stage != 3:
            raise InvalidArgumentError(
                f"Offloading parameters works at stage 3 only, this is stage {self.stage}: use stage=3, or leave out "
                f"{self.place('offload_param')} (argument offload_parameters)."
            )
        if self.offload_optimizer is None:
            return
        if self.stage == 0:
            raise InvalidArgumentError(
                "Offloading optimizer states needs a stage that splits them, this is stage 0: use stage=1, 2 or 3, or "
                f"leave out {self.place('offload_optimizer')}."
            )
        if self.offload_optimizer.device == "nvme" and self.stage != 3:
            raise InvalidArgumentError(
                f"Optimizer states go to NVMe at stage 3 only, this is stage {self.stage}: use stage=3, or "
                f'{self.place("offload_optimizer")}.device="cpu" (argument offload_optimizer_device).'
            )

    @classmethod
    def of(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """The section with what ``values`` says and the stage looks at; without a stage it is 0, as in DeepSpeed."""
        stage = cls(stage=values.get("stage", 0)).stage
        kinds = {"offload_optimizer": OptimizerOffloadConfig, "offload_param": ParameterOffloadConfig}
        offloads = {name: kind.of(values[name]) for name, kind in kinds.items() if offloads_to(values, name)}  # type: ignore[attr-defined]
        known = {n: v for n, v in values.items() if n in understood_at(stage) and n not in kinds}
        return super().of({**known, **offloads, "stage": stage})

    def section(self) -> dict[str, Any]:
        """The section as DeepSpeed takes it: the stage, and what it looks at."""
        understood = understood_at(self.stage)
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name in understood}
        return {name: plain(value) for name, value in values.items() if value is not None}


def understood_at(stage: int) -> frozenset[str]:
    """The fields that a stage looks at. The stage itself and the offloads are always among them."""
    return frozenset(one.name for one in fields(ZeroConfig) if stage in one.metadata["stages"])


def offloads_to(zero: Mapping[str, Any], name: str) -> str | None:
    """Where a section ``zero_optimization`` offloads something to; ``None`` if it does not."""
    offload = zero.get(name)
    if offload is None:
        return None
    if not isinstance(offload, Mapping):
        raise InvalidArgumentError(f"zero_optimization.{name}={offload!r}: expected a dictionary with the key device.")
    device = offload.get("device")
    return None if device in (None, "none") else device
