"""Finding the linear layers of a module and putting others in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fabric_bnb import backend
from fabric_bnb.linear import PLAIN, QuantizedLinear
from fabric_core.errors import UsageError
from fabric_core.precision.casting import cast_floats

Make = Callable[[nn.Linear], nn.Linear]


def replaceable(module: nn.Module, ignored: Collection[str]) -> dict[str, nn.Linear]:
    """The layers that can be quantised, by name.

    Left out: subclasses of ``torch.nn.Linear``, whose code would be lost; layers to which something was added, such as
    a weight norm; layers whose weight is used in another place too, which a copy in few bits would separate from it;
    and what ``ignored`` names, as far as a dot or the end: ``"head"`` means ``head`` and ``head.proj``, not ``head2``.
    """
    uses = Counter(map(id, _places(module)))
    return {
        name: part
        for name, part in module.named_modules()
        if type(part) is PLAIN and is_bare(part) and uses[id(part.weight)] == 1 and not is_ignored(name, ignored)
    }


def _places(module: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter, once for each module that holds it."""
    for part in module.modules():
        yield from (parameter for parameter in part._parameters.values() if parameter is not None)


def is_bare(linear: nn.Linear) -> bool:
    """Whether the layer holds a weight, perhaps a bias, and nothing else."""
    parameters = {name for name, parameter in linear._parameters.items() if parameter is not None}
    return "weight" in parameters and parameters <= {"weight", "bias"} and not linear._buffers and not linear._modules


def is_ignored(name: str, ignored: Collection[str]) -> bool:
    """Whether one of ``ignored`` is the name or the name of something around it."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in ignored)


def replace(module: nn.Module, layers: Collection[nn.Linear], make: Make) -> nn.Module:
    """Put ``make(layer)`` wherever one of ``layers`` stands; returns the new module if it is one of them itself."""
    made = {id(layer): make(layer) for layer in layers}
    for part in list(module.modules()):
        for name, child in part._modules.items():
            if id(child) in made:
                part._modules[name] = made[id(child)]
    return made.get(id(module), module)


def quantized_layers(module: nn.Module) -> list[QuantizedLinear]:
    """The layers with a frozen quantised weight, or one that is to be."""
    return [part for part in module.modules() if isinstance(part, QuantizedLinear)]


def has_quantized(module: nn.Module) -> bool:
    """Whether any layer of bitsandbytes, of ours or made by hand, is in the module."""
    layers = backend.load().nn
    return any(isinstance(part, (layers.Linear4bit, layers.Linear8bitLt)) for part in module.modules())


def set_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Have every layer of 4 bits compute in ``dtype``."""
    kind = backend.load().nn.Linear4bit
    for part in module.modules():
        if isinstance(part, kind):
            part.compute_dtype, part.compute_type_is_set = dtype, True


def place_foreign(module: nn.Module, device: torch.device) -> None:
    """Quantise bitsandbytes' own layers, which do that when they are moved, even to where they are."""
    layers = backend.load().nn
    for part in module.modules():
        if not is_own(part) and isinstance(part, (layers.Linear4bit, layers.Linear8bitLt)):
            part.to(device)


def is_own(part: nn.Module) -> bool:
    """Whether it is a layer of this package. Those take inputs of any dtype, and give outputs in the same."""
    own = __name__.partition(".")[0]
    return isinstance(part, QuantizedLinear) or type(part).__module__.startswith(f"{own}.")


def check_not_borrowed(module: nn.Module) -> None:
    """``RuntimeError`` if a part that is no quantised layer holds the quantised weight of one."""
    owned = {id(layer.weight): layer for layer in quantized_layers(module) if layer.is_quantized}
    names = [
        f"{name}.{key}" if name else key
        for name, part in module.named_modules()
        for key, parameter in part._parameters.items()
        if id(parameter) in owned and not isinstance(part, QuantizedLinear)
    ]
    if names:
        raise UsageError(
            f"{', '.join(names)}: shared with a linear layer that was built quantised, without a full weight. Build "
            "the module with fabric.init_module(empty_init=False), where layers that share weights keep them as they "
            "are, or tie the weights the other way round: linear.weight = other.weight."
        )


def keep_shared(module: nn.Module) -> None:
    """Leave a weight as it is that a layer was given, or has given, to share with another part of the module."""
    uses = Counter(map(id, _places(module)))
    for layer in quantized_layers(module):
        if not layer.is_quantized and uses[id(layer.weight)] > 1:
            layer.quantizes = False


def feed_own_dtype(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Have the parts that are not quantised get floating-point inputs in the dtype of their own parameters.

    Nothing is installed where all parameters and buffers have ``compute_dtype``, that of the module's inputs. Otherwise
    a part of any other dtype may be what the input of the next one comes from. A second call adds nothing.
    """
    others = [part for part in module.modules() if not is_own(part)]
    if all(tensor.dtype is compute_dtype for part in others for tensor in _floats(part._parameters, part._buffers)):
        return
    for part in others:
        if next(_floats(part._parameters), None) is not None and cast_inputs not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _floats(*tables: Mapping[str, Tensor | None]) -> Iterator[Tensor]:
    for tensor in chain.from_iterable(table.values() for table in tables):
        if tensor is not None and tensor.is_floating_point():
            yield tensor


def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A forward pre-hook: floating-point inputs in the dtype of the module's first floating-point parameter."""
    own = next(_floats(module._parameters)).dtype
    return cast_floats(args, own), cast_floats(kwargs, own)
