"""Putting stored weights into quantised layers: floating-point ones are quantised, quantised ones stay as they are.

The keys are those that bitsandbytes writes. 4 bits: ``weight`` and ``weight.absmax``, ``weight.quant_map``, for nested
scales ``weight.nested_absmax`` and ``weight.nested_quant_map``, and the rest as JSON in
``weight.quant_state.bitsandbytes__nf4``. 8 bits: ``weight``, ``SCB`` and ``weight_format``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fabric_bnb.modes import MODES
from fabric_core.checkpoint.self_loading import origin_of

if TYPE_CHECKING:
    from fabric_bnb.linear import QuantizedLinear

_PARTS_4BIT: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PACKED_4BIT: Final = "quant_state.bitsandbytes__"
_PARTS_8BIT: Final = ("SCB", "weight_format")


@dataclass(frozen=True)
class Stored:
    """What a state dict holds for the weight of one layer.

    Attributes:
        weight: floating-point or quantised; ``None`` if it is not there.
        parts: what belongs to it, by the name after ``weight.`` for 4 bits, after the layer's name for 8 bits.
        keys: of all of that, in the state dict.
    """

    weight: Tensor | None
    parts: dict[str, Tensor]
    keys: frozenset[str]

    @property
    def quant_type(self) -> str:
        """``"nf4"``, ``"fp4"``, ``"int8"``; empty for floating point."""
        packed = next((name for name in self.parts if name.startswith(_PACKED_4BIT)), "")
        if packed:
            return packed.removeprefix(_PACKED_4BIT)
        return "int8" if "SCB" in self.parts or (self.weight is not None and self.weight.dtype is torch.int8) else ""

    @property
    def mode(self) -> str:
        """The mode that stores a weight like this; empty for floating point."""
        nested = "nested_absmax" in self.parts
        found = (m.name for m in MODES.values() if not m.trainable and (m.quant_type or m.name) == self.quant_type)
        return next((name for name in found if MODES[name].nested == nested), self.quant_type)


def stored(state_dict: Mapping[str, Any], prefix: str) -> Stored:
    """What ``state_dict`` holds for the weight of the layer at ``prefix``."""
    parts = {name: prefix + name for name in _PARTS_8BIT if prefix + name in state_dict}
    start = f"{prefix}weight."
    for key in state_dict:
        name = key.removeprefix(start)
        if key.startswith(start) and (name in _PARTS_4BIT or name.startswith(_PACKED_4BIT)):
            parts[name] = key
    weight = state_dict.get(f"{prefix}weight")
    values = {name: state_dict[key] for name, key in parts.items()}
    return Stored(weight, values, frozenset({f"{prefix}weight", *parts.values()}))


def load_weight(
    layer: QuantizedLinear,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """``_load_from_state_dict`` of a quantised layer: the same arguments, the same ways to report.

    A quantised weight is taken bit by bit, whatever state the layer is in. A floating-point one is quantised if the
    layer is quantised or has no memory yet; otherwise it replaces the values that are still to be quantised. A layer
    on the meta device gets its memory where the state dict is.
    """
    assign = bool(metadata.get("assign_to_params_buffers", False))
    weight, unknown = layer._parameters["weight"], list[str]()
    if not assign:
        _give_bias_memory(layer, state_dict.get(f"{prefix}bias"))
    layer._parameters["weight"] = None
    try:  # what is left for torch: hooks, which may rename keys, and the bias
        nn.Module._load_from_state_dict(layer, state_dict, prefix, metadata, strict, missing, unknown, errors)
    finally:
        layer._parameters["weight"] = weight
    found = stored(state_dict, prefix)
    if found.weight is None:
        unexpected.extend(unknown)
        if strict:
            missing.append(f"{prefix}weight")
        return
    unexpected.extend(key for key in unknown if key not in found.keys)
    problem = _problem(layer, found)
    if problem is not None:
        errors.append(f"{prefix}weight {problem}")
        return
    with torch.no_grad():
        _fill(layer, found, assign)


def quantized_problem(state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """What is wrong for a layer that takes floating-point weights only; ``None`` if nothing."""
    found = stored(state_dict, prefix)
    if found.quant_type:
        return f"{prefix}weight {_other_mode(found, 'in floating point')}"
    return None


def may_rename(layer: nn.Module) -> bool:
    """Whether a hook may change keys before the layer sees them. That of bitsandbytes, for its old files, does not."""
    hooks = layer._load_state_dict_pre_hooks.values()
    return any(not origin_of(hook).startswith("bitsandbytes.") for hook in hooks)


def problems_of_quantized(
    layer: QuantizedLinear, state_dict: Mapping[str, Any], prefix: str, strict: bool
) -> Iterator[str]:
    """All that can be said before loading against the entries of ``state_dict`` that begin with ``prefix``.

    Values may still have to be read: tensors on the meta device stand for them.
    """
    found = stored(state_dict, prefix)
    problem = None if found.weight is None else _problem(layer, found)
    if problem is not None:
        yield f"{prefix}weight {problem}"
    if strict and found.weight is None:
        yield f"{prefix}weight is missing in the state dict"
    yield from problems_of_plain(layer, state_dict, prefix, strict, found.keys)


def problems_of_plain(
    layer: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    strict: bool,
    known: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """The same for parameters and buffers that are taken as they are.

    Args:
        layer: the layer. Modules inside it have keys of their own, and nothing is said of them.
        state_dict: what is to be loaded.
        prefix: what the layer's keys begin with.
        strict: nothing may be missing or unknown.
        known: keys that are taken in another way.
    """
    own: dict[str, Tensor] = dict(layer.named_parameters(prefix[:-1], recurse=False, remove_duplicate=False))
    buffers = layer.named_buffers(prefix[:-1], recurse=False, remove_duplicate=False)
    own |= {key: value for key, value in buffers if key[len(prefix) :] not in layer._non_persistent_buffers_set}
    for key, live in own.items():
        value = state_dict.get(key)
        if key in known:
            continue
        if value is None and strict:
            yield f"{key} is missing in the state dict"
        elif isinstance(value, Tensor) and value.shape != live.shape:
            yield f"{key} is {tuple(value.shape)} in the state dict and {tuple(live.shape)} in the layer"
    if strict:
        inside = tuple(f"{prefix}{name}." for name, _ in layer.named_children())
        expected = {*known, *own, f"{prefix}_extra_state"}
        yield from (
            f"{key} is unknown to the layer"
            for key in state_dict
            if key.startswith(prefix) and key not in expected and not key.startswith(inside)
        )


def _give_bias_memory(layer: nn.Linear, value: Tensor | None) -> None:
    bias = layer._parameters["bias"]
    if bias is not None and bias.is_meta and value is not None:
        layer._parameters["bias"] = nn.Parameter(torch.empty_like(bias, device=value.device), bias.requires_grad)


def _problem(layer: QuantizedLinear, found: Stored) -> str | None:
    """Why the weight cannot be taken; ``None`` if it can, or if only values can tell that are still to be read."""
    assert found.weight is not None
    shape, expected = tuple(found.weight.shape), (layer.out_features, layer.in_features)
    if not found.quant_type:
        if not found.weight.is_floating_point():
            return f"is {found.weight.dtype} in the state dict, and the scales to read it with are missing."
        return None if shape == expected else f"is {shape} in the state dict and {expected} in the layer."
    if found.mode != layer.mode:
        return _other_mode(found, f"of mode {layer.mode!r}")
    if not layer.quantizes:
        return "is quantised in the state dict, but the layer shares it with another one and keeps it as it is."
    absent = [name for name in layer.required_parts if name not in found.parts]
    if absent:
        return f"cannot be used without {', '.join(absent)}, which the state dict lacks."
    return layer.misfit(found.weight, found.parts)


def _other_mode(found: Stored, layer: str) -> str:
    return (
        f"is quantised as {found.mode!r} in the state dict, but the layer is {layer}. Use precision="
        f"'bnb-{found.mode}', or a state dict in floating point."
    )


def _fill(layer: QuantizedLinear, found: Stored, assign: bool) -> None:
    current, values = layer.weight, found.weight
    assert values is not None
    device = values.device if assign or current.is_meta else current.device
    if found.quant_type:
        copied = {name: part.to(device, copy=not assign) for name, part in found.parts.items()}
        layer.take(values.to(device, copy=not assign), layer.statistics_of(copied))
    elif layer.is_quantized or (current.is_meta and layer.quantizes):
        layer.pack(values.to(device))
    elif assign or current.is_meta:
        layer._parameters["weight"] = nn.Parameter(values.to(device, copy=not assign), current.requires_grad)
    else:
        current.copy_(values)
