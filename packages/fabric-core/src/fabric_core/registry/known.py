"""Who provides the names that belong to Fabric's own backends. The only file of core in which backends are named.

A name in this table is never taken by a stranger in silence, and the hint what to install comes from here alone: a
package name made from what a user typed would invite anybody to register it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fabric_core.registry.ref import name_key

_DEEPSPEED, _XLA, _CUDA, _BNB = "fabric-deepspeed", "fabric-xla", "fabric-cuda", "fabric-bnb"

NAMES: Final[dict[str, dict[str, str]]] = {
    "accelerator": {"cuda": _CUDA, "tpu": _XLA},
    "strategy": {
        "deepspeed": _DEEPSPEED,
        "deepspeed_*": _DEEPSPEED,
        "dp": _CUDA,
        "xla": _XLA,
        "xla_fsdp": _XLA,
        "single_xla": _XLA,
        "single_tpu": _XLA,
    },
    "precision": {
        "transformer-engine": _CUDA,
        "transformer-engine-*": _CUDA,
        "deepspeed.*": _DEEPSPEED,
        "xla.*": _XLA,
        "nf4": _BNB,
        "nf4-dq": _BNB,
        "fp4": _BNB,
        "fp4-dq": _BNB,
        "int8": _BNB,
        "int8-training": _BNB,
        "bnb-nf4": _BNB,
        "bnb-nf4-dq": _BNB,
        "bnb-fp4": _BNB,
        "bnb-fp4-dq": _BNB,
        "bnb-int8": _BNB,
        "bnb-int8-training": _BNB,
    },
}
"""Kind to name to distribution. A trailing ``*`` stands for any ending."""

DEVICES: Final[dict[str, str]] = {"cuda": _CUDA, "xla": _XLA}
"""Device type, as torch names it, to the distribution that serves it."""

CLASSES: Final[dict[str, tuple[str, str]]] = {
    "BitsandbytesPrecision": (_BNB, "fabric_bnb.precision:BitsandbytesPrecision"),
    "CUDAAccelerator": (_CUDA, "fabric_cuda.accelerator:CUDAAccelerator"),
    "DataParallelStrategy": (_CUDA, "fabric_cuda.strategies.data_parallel:DataParallelStrategy"),
    "DeepSpeedPrecision": (_DEEPSPEED, "fabric_deepspeed.precision:DeepSpeedPrecision"),
    "DeepSpeedStrategy": (_DEEPSPEED, "fabric_deepspeed.strategy:DeepSpeedStrategy"),
    "SingleDeviceXLAStrategy": (_XLA, "fabric_xla.strategies.single_device:SingleDeviceXLAStrategy"),
    "TransformerEnginePrecision": (_CUDA, "fabric_cuda.transformer_engine:TransformerEnginePrecision"),
    "XLAAccelerator": (_XLA, "fabric_xla.accelerator:XLAAccelerator"),
    "XLAFSDPStrategy": (_XLA, "fabric_xla.strategies.fsdp:XLAFSDPStrategy"),
    "XLAPrecision": (_XLA, "fabric_xla.precision:XLAPrecision"),
    "XLAStrategy": (_XLA, "fabric_xla.strategies.xla:XLAStrategy"),
}
"""Classes that programs import from ``fabric_core.strategies`` and its kin, to the distribution they live in."""

MIN_PLUGIN_VERSIONS: Final[dict[str, str]] = {}
"""Distribution to the oldest version that this core works with, for what was found out after a plugin's release."""


@dataclass(frozen=True)
class Known:
    """The table, with the questions that are asked of it.

    Attributes:
        names: as ``NAMES``.
        minimum: as ``MIN_PLUGIN_VERSIONS``.
    """

    names: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: NAMES)
    minimum: Mapping[str, str] = field(default_factory=lambda: MIN_PLUGIN_VERSIONS)

    def owner(self, kind: str, name: str) -> str | None:
        """The distribution that a name or its beginning belongs to."""
        reserved = self.reserved_for(kind, name)
        if reserved is not None:
            return reserved
        key = name_key(name)
        for pattern, dist in self.names.get(kind, {}).items():
            if pattern.endswith("*") and key.startswith(name_key(pattern[:-1])):
                return dist
        return None

    def reserved_for(self, kind: str, name: str) -> str | None:
        """The distribution that alone may provide the name. A mere beginning reserves nothing."""
        key = name_key(name)
        return next((dist for known, dist in self.names.get(kind, {}).items() if name_key(known) == key), None)

    def full(self, kind: str) -> tuple[str, ...]:
        """All names of the kind that are given in full."""
        return tuple(name for name in self.names.get(kind, {}) if not name.endswith("*"))


def device_hint(device_type: str) -> str | None:
    """The distribution that serves a device type of torch, ``None`` if Fabric has none for it."""
    return DEVICES.get(device_type)
