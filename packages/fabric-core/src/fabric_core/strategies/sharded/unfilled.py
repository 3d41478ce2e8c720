"""Which parameters and buffers still hold nothing, after they left the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_core.checkpoint.dtensors import local_of
from fabric_core.distributed.group import carrying_device
from fabric_core.errors import UsageError
from fabric_core.strategies.sharded.agreement import alone, same_everywhere
from fabric_core.strategies.sharded.groups import class_name

_MARK: Final = "_fabric_unfilled"
"""Attribute of a module: its own tensors without values, by name."""


@dataclass
class _Seen:
    """A tensor as it was when nobody had written to it; only for dtypes that have no NaN."""

    tensor: Tensor | None = None
    version: int = 0


def fill(tensor: Tensor) -> None:
    """NaN everywhere, zero if the dtype has none."""
    with torch.no_grad():
        tensor.fill_(float("nan")) if _has_nan(tensor) else tensor.zero_()


def untouched(tensor: Tensor, version: int | None) -> bool:
    """Whether nobody has written to a tensor since ``fill``, when it had ``version`` (``None``: it was another one)."""
    if _has_nan(tensor):
        # One value tells nearly always, and the mask of all of them would leave holes in the memory of the process.
        return tensor.numel() > 0 and bool(tensor[(0,) * tensor.dim()].isnan()) and bool(tensor.isnan().all())
    return tensor._version == version


def _has_nan(tensor: Tensor) -> bool:
    floating = tensor.is_floating_point() or tensor.is_complex()
    return floating and tensor.element_size() > 1  # 8-bit formats: not all have NaN, none can be asked for it


def mark(part: nn.Module, name: str, missing: bool = True) -> None:
    """Note that the part's own tensor ``name`` has no values, or that it has."""
    marks: dict[str, _Seen] = part.__dict__.setdefault(_MARK, {})
    if missing:
        marks[name] = _Seen()
    else:
        marks.pop(name, None)
    if not marks:
        del part.__dict__[_MARK]


def marked(part: nn.Module, name: str) -> bool:
    """Whether the part's own tensor ``name`` is marked."""
    return name in part.__dict__.get(_MARK, ())


def watch(module: nn.Module, device: torch.device) -> None:
    """The first forward of ``module`` checks that marked tensors were written to since; no marks, no check.

    Raises:
        RuntimeError: on all ranks, if a tensor has no values on some ranks and has them on others.
    """
    places = _marked_places(module)
    if not same_everywhere([(path, name) for path, _, name in places], device):
        here = ", ".join(f"{path}.{name}" if path else name for path, _, name in places) or "none"
        raise UsageError(
            f"Not all ranks built {class_name(module)} alike: which of its parameters and buffers have no values "
            f"after set-up differs between them (here: {here}). Build it on the meta device everywhere or nowhere, or "
            "leave sync_module_states on, so that rank 0's values go to all."
        )
    if not places:
        return
    for _, part, name in places:
        tensor = _tensor(part, name)
        if not _has_nan(tensor):
            part.__dict__[_MARK][name] = _Seen(tensor, _version(tensor))

    def check(*_: Any) -> None:
        check_filled(module, device)
        handle.remove()

    # Ahead of the hooks of fully_shard, which replace the parameters for the length of a forward.
    handle = module.register_forward_pre_hook(torch.compiler.disable(check), prepend=True)


def check_filled(module: nn.Module, device: torch.device) -> None:
    """``RuntimeError`` if a tensor of ``module`` has never had values on any rank; it lists all names.

    Every rank calls it; one small message if there are marks, nothing otherwise. What has values by now is checked
    for the last time.
    """
    places = _marked_places(module)
    if not places:
        return
    votes = torch.tensor([_is_empty(part, name) for _, part, name in places], dtype=torch.int32)
    if not alone():
        votes = votes.to(carrying_device(device))
        dist.all_reduce(votes, dist.ReduceOp.MIN)
    missing = []
    for (path, part, name), empty in zip(places, votes.tolist(), strict=True):
        if empty:
            note = " (a buffer that is not stored in checkpoints)" if name in part._non_persistent_buffers_set else ""
            missing.append((f"{path}.{name}" if path else name) + note)
        else:
            mark(part, name, False)
    if missing:
        raise UsageError(
            f"{len(missing)} parameters or buffers of {class_name(module)} have no values: {', '.join(missing)}. "
            "They were created on the meta device, and neither a checkpoint nor you have filled them since, and their "
            "modules have no method reset_parameters() that does. Load a checkpoint after set-up, write values into "
            "them, give the module's class such a method, or create it under fabric.init_module(empty_init=False)."
        )


def _marked_places(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [
        (path, part, name)
        for path, part in module.named_modules()
        for name in part.__dict__.get(_MARK, ())
        if _tensor(part, name) is not None
    ]


def _tensor(part: nn.Module, name: str) -> Any:
    parameter = part._parameters.get(name)
    return part._buffers.get(name) if parameter is None else parameter


def _is_empty(part: nn.Module, name: str) -> bool:
    """Whether this rank has seen no value; a rank that holds no element has not."""
    tensor: Tensor = _tensor(part, name)
    seen: _Seen = part.__dict__[_MARK][name]
    if not _has_nan(tensor):
        return seen.tensor is tensor and seen.version == _version(tensor)
    return bool(local_of(tensor).isnan().all())


def _version(tensor: Tensor) -> int:
    """How often it was written to, through the tensor or through this process's part."""
    local = local_of(tensor)
    return tensor._version + (local._version if local is not tensor else 0)
