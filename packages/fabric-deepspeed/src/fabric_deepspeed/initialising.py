"""Building a model under ``init_module``: at stage 3 each layer is split over the processes as soon as it is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from fabric_deepspeed.config.tree import stated
from fabric_deepspeed.config.zero import offloads_to


@contextmanager
def split_while_building(deepspeed: ModuleType, config: Mapping[str, Any], remote_device: str | None) -> Iterator[None]:
    """Entered while a module is built. Every rank builds the same one; the values are those of rank 0.

    A layer initialises itself before it is split. What a module does to the weights of its children afterwards reaches
    them through ``Module.apply`` only, or inside ``deepspeed.zero.GatheredParameters``.

    Args:
        deepspeed: the package.
        config: DeepSpeed's dictionary, final: it holds the dtype and where parameters are kept.
        remote_device: where the parts are kept if the dictionary does not say; ``None`` for the device.
    """
    with deepspeed.zero.Init(config_dict_or_path=dict(config), remote_device=remote_device):
        yield


def split_in_float32(deepspeed: ModuleType, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Split a module in single precision whose parameters go to NVMe, in place; nothing happens to others.

    DeepSpeed itself would do it as it takes the module over, but keep them there in 16 bits if the device is one that
    does not compute in float16, as a CPU.
    """
    where = offloads_to(config.get("zero_optimization") or {}, "offload_param")
    half = any(stated(config, (name, "enabled")) for name in ("fp16", "bf16"))
    if where == "nvme" and not half and not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        deepspeed.zero.Init(module=module, config_dict_or_path=dict(config), remote_device=where)
