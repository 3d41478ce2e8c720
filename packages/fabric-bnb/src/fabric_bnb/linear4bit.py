"""A linear layer whose frozen weight has 4 bits per value, through bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fabric_bnb import backend
from fabric_bnb.linear import QuantizedLinear, QuantizedWeight
from fabric_bnb.modes import mode_of

bnb: Any = backend.load()
QuantState = Any
"""``bitsandbytes.functional.QuantState``; the package's types do not tell enough to be of use."""


class Weight4bit(QuantizedWeight, bnb.nn.Params4bit):  # type: ignore[misc]
    """A weight of 4 bits."""


class QuantizedLinear4bit(QuantizedLinear, bnb.nn.Linear4bit):  # type: ignore[misc]
    """``(..., in_features)`` to ``(..., out_features)``; blocks of 64 weights share a scale.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether one is added.
        device: of the parameters.
        dtype: of the bias, and of the weight before it is quantised.
        quant_type: what the 16 values stand for: ``"nf4"`` suits weights that are normally distributed.
        nested: the scales are quantised too.
        compute_dtype: what the product is computed in; the input's dtype if ``None``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        bnb.nn.Linear4bit.__init__(
            self,
            in_features,
            out_features,
            bias,
            compute_dtype=compute_dtype,
            compress_statistics=nested,
            quant_type=quant_type,
            device=torch.device("meta"),
        )
        self.quant_type, self.nested = quant_type, nested
        self.mode = mode_of(4, quant_type, nested)
        scales = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ()))
        self.required_parts = (*scales, f"quant_state.bitsandbytes__{quant_type}")
        # On some CPUs bitsandbytes rearranges the weight at inference, rounds its scales and cannot undo that.
        self.support_avx512bf16_for_cpu = False
        self._start(device, dtype)

    @property
    def quant_state(self) -> QuantState:
        """The scales and what they mean; ``None`` before the weight is quantised. They belong to the weight."""
        return getattr(self._parameters["weight"], "quant_state", None)

    @quant_state.setter
    def quant_state(self, state: QuantState) -> None:
        """Nothing to keep: bitsandbytes sets it to ``None`` in its constructor, and to the weight's elsewhere."""

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in 4 bits by now."""
        return self.quant_state is not None

    def pack(self, weight: Tensor) -> None:
        """Take over the values of ``weight``, ``(out_features, in_features)``, quantised on its device."""
        values = weight if weight.dtype in (torch.float32, torch.float16, torch.bfloat16) else weight.float()
        packed, state = bnb.functional.quantize_4bit(
            values.contiguous(), compress_statistics=self.nested, quant_type=self.quant_type
        )
        self.take(packed, state)

    def dequantize(self) -> Tensor:
        """The quantised weight, ``(out_features, in_features)``, in the dtype that it had before."""
        weight: Tensor = bnb.functional.dequantize_4bit(self.weight.data, self.quant_state)
        return weight

    def statistics(self) -> list[Tensor]:
        """Scales of the blocks; if nested, the scales of these too, and their mean."""
        state = self.quant_state
        return [state.absmax, state.state2.absmax, state.offset] if state.nested else [state.absmax]

    def take(self, packed: Tensor, statistics: QuantState) -> None:
        """Store a quantised weight, ``(n, 1)``, and its quant state, as they are."""
        weight: Any = self._parameters["weight"]
        if isinstance(weight, Weight4bit):
            weight.data, weight.quant_state = packed, statistics  # the same object: others may know it
            return
        self._parameters["weight"] = Weight4bit(
            packed,
            requires_grad=False,
            quant_state=statistics,
            blocksize=statistics.blocksize,
            compress_statistics=statistics.nested,
            quant_type=statistics.quant_type,
            quant_storage=packed.dtype,
            bnb_quantized=True,
        )

    def held(self) -> tuple[Tensor, QuantState]:
        """What ``take`` takes."""
        return self.weight.data, self.quant_state

    def drop(self) -> None:
        """Forget the scales: the weight is not quantised any more."""
        weight: Any = self._parameters["weight"]
        weight.quant_state = None

    def move_statistics(self, device: torch.device) -> None:
        """Put the scales where the weight is."""
        self.quant_state.to(device)

    def statistics_of(self, parts: dict[str, Tensor]) -> QuantState:
        """The quant state that the entries of a state dict stand for."""
        return bnb.functional.QuantState.from_dict(dict(parts), device=parts["absmax"].device)

    def misfit(self, packed: Tensor, parts: dict[str, Tensor]) -> str | None:
        """Why a stored weight of this mode does not fit the layer; ``None`` if it does, as far as parts can be read."""
        if not any(part.is_meta for part in parts.values()):
            try:
                shape = tuple(self.statistics_of(parts).shape)
            except Exception as error:  # whatever is in there
                return f"has a quant state in the state dict that cannot be read ({type(error).__name__}: {error})."
            expected = (self.out_features, self.in_features)
            if shape != expected:
                return f"is {shape} in the state dict and {expected} in the layer."
        size, needed = packed.numel() * packed.element_size(), (self.out_features * self.in_features + 1) // 2
        return None if size == needed else f"has {size} bytes in the state dict, but 4 bits per value are {needed}."

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.is_quantized:
            parts = self.quant_state.as_dict(packed=True)
            destination.update({f"{prefix}weight.{name}": part for name, part in parts.items()})

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``(n, in_features)`` times the quantised weight, plus the bias."""
        # Transposed, as releases before 0.50 want it; later ones take both.
        out: Tensor = bnb.matmul_4bit(x, self.weight.t(), bias=bias, quant_state=self.quant_state)
        return out
