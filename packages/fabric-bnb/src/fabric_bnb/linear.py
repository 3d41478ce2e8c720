"""What every linear layer with a frozen weight in few bits has in common; how the bits are made is left to subclasses.

The weight goes through up to three stages. Without values it is a parameter on the meta device. With values it is an
ordinary floating-point parameter, so that it can be initialised, tied and loaded like any other. Quantised, it is a
parameter of small integers, with scales beside it. The last step is taken layer by layer: where the layer moves to an
accelerator, where ``quantize()`` is called, and at the latest in the first forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fabric_bnb.loading import load_weight, may_rename, problems_of_quantized
from fabric_core.errors import UsageError

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_Layer = TypeVar("_Layer", bound="QuantizedLinear")
PLAIN: Final = nn.Linear
"""torch's own class, whatever ``torch.nn.Linear`` stands for at the moment."""


class QuantizedWeight:
    """A quantised weight that torch knows to be no ordinary tensor.

    Inference code of torch that takes the weights of layers past their forward, as that of its transformer layers,
    then keeps off.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]


class QuantizedLinear(nn.Linear):
    """``(..., in_features)`` to ``(..., out_features)`` with a frozen weight of few bits.

    Inputs of any floating-point dtype; the output has the input's. Gradients flow to the input and the bias.

    Attributes:
        mode: how the weight is stored; a key of ``fabric_bnb.modes.MODES``.
        required_parts: the entries of a state dict that a quantised weight needs beside it.
        compute_dtype: what the product is computed in; the input's dtype if ``None``.
        quantizes: ``False`` leaves the weight as it is, for one that another layer uses too.
    """

    mode: str
    required_parts: tuple[str, ...]
    compute_dtype: torch.dtype | None
    quantizes: bool

    @property
    @abstractmethod
    def is_quantized(self) -> bool:
        """Whether the weight is stored in few bits by now."""

    @abstractmethod
    def pack(self, weight: Tensor) -> None:
        """Take over the values of ``weight``, ``(out_features, in_features)``, quantised on its device."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The quantised weight in floating point, ``(out_features, in_features)``."""

    @abstractmethod
    def statistics(self) -> list[Tensor]:
        """The scales, which are neither parameters nor buffers, so that no cast of the module rounds them."""

    @abstractmethod
    def take(self, packed: Tensor, statistics: Any) -> None:
        """Store a quantised weight and what belongs to it, as they are."""

    @abstractmethod
    def held(self) -> tuple[Tensor, Any]:
        """What ``take`` takes."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the scales: the weight is not quantised any more."""

    @abstractmethod
    def move_statistics(self, device: torch.device) -> None:
        """Put the scales where the weight is."""

    @abstractmethod
    def statistics_of(self, parts: dict[str, Tensor]) -> Any:
        """What ``take`` takes, made from entries of a state dict."""

    @abstractmethod
    def misfit(self, packed: Tensor, parts: dict[str, Tensor]) -> str | None:
        """Why a stored weight of this mode does not fit the layer; ``None`` if it does."""

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``(n, in_features)`` times the quantised weight, plus the bias, both in ``compute_dtype``."""

    @classmethod
    def of(cls: type[_Layer], linear: nn.Linear, **settings: Any) -> _Layer:
        """A layer in the place of ``linear``: the same bias, training mode and hooks, the same values unquantised."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device=torch.device("meta"), **settings
        )
        layer.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        layer._parameters["bias"] = linear._parameters["bias"]
        take_over(layer, linear)
        return layer

    def _start(self, device: Any, dtype: torch.dtype | None) -> None:
        """Give the parameters their place, after a base class has made them on the meta device, and draw values."""
        self.quantizes = True
        place = torch.empty(0, device=device, dtype=dtype)
        if place.is_meta:
            self._parameters["weight"] = nn.Parameter(self.weight.data.to(place.dtype), requires_grad=False)
            if self.bias is not None:
                self._parameters["bias"] = nn.Parameter(self.bias.data.to(place.dtype))
            return
        self._parameters["weight"] = nn.Parameter(place.new_empty(self._shape), requires_grad=False)
        if self.bias is not None:
            self._parameters["bias"] = nn.Parameter(place.new_empty(self.out_features))
        if initialisation_is_skipped():
            self._pack_nothing(self.weight.data)
        else:
            self.reset_parameters()

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def quantize(self) -> None:
        """Quantise the weight where it is. Nothing happens if it is done already, or is not to be.

        Raises:
            RuntimeError: the weight is on the meta device and has no values.
        """
        if self.is_quantized or not self.quantizes:
            return
        if self.weight.is_meta:
            raise UsageError(
                "A linear layer cannot be quantised: its weight is on the meta device and has no values. Load a state "
                "dict into the module, or fill it: module.to_empty(device=...), then reset_parameters()."
            )
        self.pack(self.weight.data)

    def _pack_nothing(self, memory: Tensor) -> None:
        """A quantised weight without values: NaN, so that nobody computes with it unawares."""
        self.pack(memory.zero_())
        for scale in self.statistics():
            if scale.is_floating_point():
                scale.fill_(torch.nan)

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``torch.nn.Linear`` draws them."""
        if not hasattr(self, "quantizes"):
            return  # a base class is still constructing: its values would be thrown away
        if not self.is_quantized:
            PLAIN.reset_parameters(self)
        elif not initialisation_is_skipped():
            packed, _ = self.held()
            bias = self.bias is not None
            fresh = PLAIN(self.in_features, self.out_features, bias, device=packed.device)
            if bias:
                self.bias.data.copy_(fresh.bias)
            self.pack(fresh.weight.data)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, in the dtype of ``input``."""
        if not self.is_quantized:
            if not self.quantizes:
                bias = self.bias if self.bias is None else self.bias.to(input.dtype)
                return functional.linear(input, self.weight.to(input.dtype), bias)
            self.quantize()
        dtype = self.compute_dtype or input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # In two dimensions: the backends take a third one, but sum the gradient of the bias over the first only.
        flat = self.product(input.reshape(-1, self.in_features).to(dtype), bias)
        return flat.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight = self._parameters["weight"]
        if not self.quantizes:
            return nn.Module._apply(self, fn, recurse)
        self._parameters["weight"] = None
        try:
            nn.Module._apply(self, fn, recurse)
        finally:
            self._parameters["weight"] = weight
        with torch.no_grad():
            if self.is_quantized:
                self._apply_to_quantized(fn)
            else:
                self._apply_to_plain(fn)
        return self

    def _apply_to_quantized(self, fn: Callable[[Tensor], Tensor]) -> None:
        packed, statistics = self.held()
        moved = fn(packed)
        if moved.is_meta:
            self.drop()
            empty = torch.empty(self._shape, device="meta")
            self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        elif moved is not packed:
            self.take(moved, statistics)
            self.move_statistics(moved.device)

    def _apply_to_plain(self, fn: Callable[[Tensor], Tensor]) -> None:
        weight = self.weight
        applied = fn(weight.data)
        if weight.is_meta and not applied.is_meta:
            self._pack_nothing(applied)  # memory as it came
        elif applied.is_meta and not weight.is_meta:
            self._parameters["weight"] = nn.Parameter(applied, requires_grad=False)
        elif applied.device.type in ("cpu", "meta"):
            weight.data = applied  # nothing tells a cast from a move here, and an initialisation may be about to follow
        else:
            self.pack(applied)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.is_quantized:
            state["_held"] = self.held()
            state["_parameters"] = {**self._parameters, "weight": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state.pop("_held", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if held is not None:
            self.take(*held)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        load_weight(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def state_dict_problems(self, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> list[str]:
        """What is wrong with the entries that begin with ``prefix``; ``fabric.load`` asks before it writes anything."""
        return [] if may_rename(self) else list(problems_of_quantized(self, state_dict, prefix, strict))

    def extra_repr(self) -> str:
        """Sizes and mode."""
        return f"{super().extra_repr()}, mode={self.mode!r}, quantized={self.is_quantized}"


def take_over(layer: nn.Linear, linear: nn.Linear) -> None:
    """Let ``layer`` run the hooks of ``linear`` and be in the same mode."""
    layer.training = linear.training
    for hooks in _HOOKS:
        layer.__dict__[hooks] = linear.__dict__[hooks]


def initialisation_is_skipped() -> bool:
    """Whether ``torch.nn.init`` leaves tensors as they are at the moment, as under ``init_module(empty_init=True)``."""
    probe = torch.zeros(1, device="cpu")
    nn.init.ones_(probe)
    return not probe.item()
