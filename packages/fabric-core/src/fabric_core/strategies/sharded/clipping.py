"""Norms and limits of gradients that are split over processes, computed on the parts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fabric_core.checkpoint.dtensors import local_of
from fabric_core.errors import InvalidArgumentError

_WITHOUT_FLOAT64: Final = frozenset({"mps", "xpu"})
Axes = tuple[tuple[Any, str], ...]
"""What a gradient is split over: process groups, each with the type of device that it sends from."""


def total_norm(parameters: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm over all elements of all gradients, whole, on the first gradient's device; shape ``()``.

    In float64 if that gradient is, else in float32. One message for each process group that gradients are split over,
    of one number per way of splitting. Sums that are pending (``Partial``) are done first, and stay done.
    """
    if not norm_type > 0:
        raise InvalidArgumentError(f"norm_type={norm_type}: gradients that are split have norms of positive order.")
    by_axes: dict[Axes, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        grad = _settled(parameter)
        by_axes[_split_over(grad)].append(local_of(grad))
    first = next(iter(by_axes.values()))[0]
    powers = {axes: _power(parts, norm_type, first.device) for axes, parts in by_axes.items()}
    while pending := [axes for axes in powers if axes]:
        _reduce_over(_next_axis(pending), powers, norm_type)
    total = powers[()]
    dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
    return (total if math.isinf(norm_type) else total ** (1 / norm_type)).to(first.device, dtype)


def scale_parts(parameters: Iterable[Tensor], max_norm: float, total: Tensor) -> None:
    """Scale all gradients by ``max_norm / total`` if that is less than one."""
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for parts in _alike(local_of(p.grad) for p in parameters if p.grad is not None):
        torch._foreach_mul_(parts, factor.to(parts[0].device))


def clamp_parts(parameters: Sequence[Tensor], limit: float) -> None:
    """Limit every element of every gradient to ``[-limit, limit]``."""
    with torch.no_grad():
        for parts in _alike([local_of(_settled(parameter)) for parameter in parameters]):
            torch._foreach_clamp_min_(parts, -limit)
            torch._foreach_clamp_max_(parts, limit)


def _settled(parameter: Tensor) -> Tensor:
    """The gradient, after sums over processes that are still pending: split as the parameter is, or not at all."""
    grad = parameter.grad
    assert grad is not None
    if isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements):
        if isinstance(parameter, DTensor) and parameter.device_mesh == grad.device_mesh:
            placements = parameter.placements
        else:
            placements = tuple(Replicate() if placement.is_partial() else placement for placement in grad.placements)
        parameter.grad = grad = grad.redistribute(placements=placements)
    return grad


def _split_over(grad: Tensor) -> Axes:
    if not isinstance(grad, DTensor):
        return ()
    mesh = grad.device_mesh
    split = (i for i, placement in enumerate(grad.placements) if not placement.is_replicate() and mesh.size(i) > 1)
    return tuple((mesh.get_group(i), mesh.device_type) for i in split)


def _alike(parts: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """The parts that hold anything, by device and dtype."""
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for part in parts:
        if part.numel():
            kinds[part.device, part.dtype].append(part)
    return kinds.values()


def _power(parts: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """This process's largest element or sum of powers; in float64, which holds powers of what float32 holds."""
    wide = torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64
    norms: list[Tensor] = []
    for alike in _alike(parts):
        dtype = None if alike[0].dtype is torch.float64 else torch.float32
        norms.extend(norm.to(device, wide) for norm in torch._foreach_norm(alike, norm_type, dtype=dtype))
    if not norms:
        return torch.zeros((), dtype=wide, device=device)
    together = torch.stack(norms)
    return together.max() if math.isinf(norm_type) else (together**norm_type).sum()


def _next_axis(pending: list[Axes]) -> tuple[Any, str]:
    """One that comes last wherever it occurs, if there is one: then all that is split over it travels together."""
    last = [axes[-1] for axes in pending]
    return next((axis for axis in last if all(axis not in axes[:-1] for axes in pending)), last[0])


def _reduce_over(axis: tuple[Any, str], powers: dict[Axes, Tensor], norm_type: float) -> None:
    """Reduce what is split over ``axis``, in one message, and add it to what is split over the other axes only."""
    group, device_type = axis
    infinite = math.isinf(norm_type)
    split = [axes for axes in powers if axis in axes]
    values = torch.stack([powers.pop(axes) for axes in split])
    if infinite:
        values = values.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over processes may overlook NaN
    there = values.to(device_type)
    dist.all_reduce(there, dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=group)
    for axes, value in zip(split, there.to(values.device).unbind(), strict=True):
        rest = tuple(other for other in axes if other != axis)
        known = powers.get(rest)
        combine = torch.maximum if infinite else torch.add
        powers[rest] = value if known is None else combine(known, value)
