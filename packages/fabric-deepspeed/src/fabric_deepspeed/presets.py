"""The names of the strategy, each for some of its arguments. Importing this imports neither torch nor DeepSpeed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from fabric_deepspeed.strategy import DeepSpeedStrategy


class _Signature:
    """What the strategy takes, by keyword, with a preset's arguments as defaults; read when it is asked for."""

    def __get__(self, preset: Preset | None, owner: type) -> inspect.Signature:
        if preset is None:
            raise AttributeError("__signature__")  # the class has the one of its constructor
        from fabric_deepspeed.strategy import DeepSpeedStrategy

        parameters = inspect.signature(DeepSpeedStrategy).parameters.values()
        return inspect.Signature([_by_keyword(parameter, preset.arguments) for parameter in parameters])


def _by_keyword(parameter: inspect.Parameter, arguments: Mapping[str, Any]) -> inspect.Parameter:
    if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
        return parameter
    default = arguments.get(parameter.name, parameter.default)
    return parameter.replace(kind=parameter.KEYWORD_ONLY, default=default)


@dataclass(frozen=True)
class Preset:
    """Some arguments of ``DeepSpeedStrategy`` under a name; calling it makes the strategy.

    Attributes:
        name: what ``Fabric(strategy=...)`` takes.
        arguments: they count as typed by the user: a configuration that contradicts them is an error.
    """

    fabric_api: ClassVar[str] = "1"
    __signature__: ClassVar[_Signature] = _Signature()

    name: str
    arguments: Mapping[str, Any]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"Preset({self.name!r}: DeepSpeedStrategy({arguments}))"

    def __call__(self, **arguments: Any) -> DeepSpeedStrategy:
        """The strategy, with more arguments, or others in place of the preset's."""
        from fabric_deepspeed.strategy import DeepSpeedStrategy

        return DeepSpeedStrategy(**{**self.arguments, **arguments})


def _preset(name: str, **arguments: Any) -> Preset:
    return Preset(name, MappingProxyType(arguments))


deepspeed: Final = _preset("deepspeed")
stage_1: Final = _preset("deepspeed_stage_1", stage=1)
stage_1_offload: Final = _preset("deepspeed_stage_1_offload", stage=1, offload_optimizer=True)
stage_2: Final = _preset("deepspeed_stage_2", stage=2)
stage_2_offload: Final = _preset("deepspeed_stage_2_offload", stage=2, offload_optimizer=True)
stage_3: Final = _preset("deepspeed_stage_3", stage=3)
stage_3_offload: Final = _preset("deepspeed_stage_3_offload", stage=3, offload_optimizer=True, offload_parameters=True)
stage_3_offload_nvme: Final = _preset(
    "deepspeed_stage_3_offload_nvme",
    stage=3,
    offload_optimizer=True,
    offload_parameters=True,
    remote_device="nvme",
    offload_params_device="nvme",
    offload_optimizer_device="nvme",
)
