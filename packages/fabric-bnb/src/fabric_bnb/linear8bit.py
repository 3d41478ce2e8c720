"""Linear layers that multiply in 8 bits, through bitsandbytes: one with a frozen weight, one to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fabric_bnb import backend
from fabric_bnb.linear import PLAIN, QuantizedLinear, QuantizedWeight, take_over
from fabric_bnb.loading import may_rename, problems_of_plain, quantized_problem

bnb: Any = backend.load()
OUTLIER: Final = 6.0
"""Columns of the input with a value beyond this are multiplied in 16 bits. From the LLM.int8() paper, section 3.2."""


class Weight8bit(QuantizedWeight, bnb.nn.Int8Params):  # type: ignore[misc]
    """A weight of 8 bits."""


class QuantizedLinear8bit(QuantizedLinear, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """``(..., in_features)`` to ``(..., out_features)``; each row of the frozen weight has a scale.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether one is added.
        device: of the parameters.
        dtype: of the bias, and of the weight before it is quantised.
        threshold: input columns with a larger value are multiplied in 16 bits, where the device does it in 8.
        compute_dtype: of inputs and outputs of the product; float16 is what bitsandbytes quantises from.
    """

    state: Any  # the scales, and how bitsandbytes wants to be called
    mode = "int8"
    required_parts = ("SCB",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float = OUTLIER,
        compute_dtype: torch.dtype | None = torch.float16,
    ) -> None:
        bnb.nn.Linear8bitLt.__init__(
            self,
            in_features,
            out_features,
            bias,
            has_fp16_weights=False,
            threshold=threshold,
            device=torch.device("meta"),
        )
        self.compute_dtype = compute_dtype
        self._start(device, dtype)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in 8 bits by now."""
        return self.state.SCB is not None

    def pack(self, weight: Tensor) -> None:
        """Take over the values of ``weight``, ``(out_features, in_features)``, quantised on its device."""
        values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        self.take(values, scales)

    def dequantize(self) -> Tensor:
        """The quantised weight in float32, ``(out_features, in_features)``."""
        weight: Tensor = self.weight.data * (self.state.SCB[:, None] / 127)
        return weight

    def statistics(self) -> list[Tensor]:
        """The largest absolute value of each row, ``(out_features,)``."""
        return [self.state.SCB]

    def take(self, packed: Tensor, statistics: Tensor) -> None:
        """Store a quantised weight, ``(out_features, in_features)`` in int8, and its scales, as they are."""
        if isinstance(self._parameters["weight"], Weight8bit):
            self.weight.data = packed  # the same object: others may know it
        else:
            self._parameters["weight"] = Weight8bit(packed, requires_grad=False, has_fp16_weights=False)
        self.state.CB, self.state.SCB = packed, statistics

    def held(self) -> tuple[Tensor, Tensor]:
        """What ``take`` takes."""
        return self.weight.data, self.state.SCB

    def drop(self) -> None:
        """Forget the scales: the weight is not quantised any more."""
        self.state.CB = self.state.SCB = None

    def move_statistics(self, device: torch.device) -> None:
        """Put the scales where the weight is."""
        self.state.SCB = self.state.SCB.to(device)

    def statistics_of(self, parts: dict[str, Tensor]) -> Tensor:
        """The scales among the entries of a state dict."""
        return parts["SCB"]

    def misfit(self, packed: Tensor, parts: dict[str, Tensor]) -> str | None:
        """Why a stored weight of this mode does not fit the layer; ``None`` if it does."""
        shape, expected = tuple(packed.shape), (self.out_features, self.in_features)
        if shape != expected or packed.dtype is not torch.int8:
            return f"is {shape} of {packed.dtype} in the state dict and {expected} of torch.int8 in the layer."
        rows = tuple(parts["SCB"].shape)
        return None if rows == shape[:1] else f"has scales of shape {rows} in the state dict, not {shape[:1]}."

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``(n, in_features)`` times the quantised weight, plus the bias."""
        self.state.is_training = self.training
        return _product(x, self.weight, bias, self.state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.is_quantized:
            destination[f"{prefix}SCB"] = self.state.SCB
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8, device="cpu")  # by rows

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["state"] = _fresh_state(self.state)
        return state


class TrainableLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """``(..., in_features)`` to ``(..., out_features)``; a float16 weight, quantised anew for each product.

    It saves time where 8-bit products are faster, and no memory. The weight is an ordinary parameter.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether one is added.
        device: of the parameters.
        dtype: of the bias; the weight is in float16.
        threshold: input columns with a larger value are multiplied in 16 bits, where the device does it in 8.
    """

    mode = "int8-training"
    compute_dtype: torch.dtype | None = torch.float16

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float = OUTLIER,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, has_fp16_weights=True, threshold=threshold, device=torch.device("meta")
        )
        drawn = PLAIN(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(drawn)

    @classmethod
    def of(cls, linear: nn.Linear, **settings: Any) -> TrainableLinear8bit:
        """A layer in the place of ``linear``, with its very parameters, so that optimizers over them go on."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device=torch.device("meta"), **settings
        )
        layer._adopt(linear)
        return layer

    def _adopt(self, linear: nn.Linear) -> None:
        weight = linear.weight
        if weight.is_meta:  # where the data of a parameter cannot change its dtype
            weight = nn.Parameter(weight.data.to(torch.float16), requires_grad=weight.requires_grad)
        else:
            weight.data = weight.data.to(torch.float16)
        self._parameters["weight"], self._parameters["bias"] = weight, linear._parameters["bias"]
        take_over(self, linear)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, in the dtype of ``input``."""
        # A state of its own each time: a shared one keeps the quantised weight from before the optimizer's step.
        state = _fresh_state(self.state)
        state.is_training = True  # for lack of a kernel, the other way has no gradient for the weight on CPUs
        bias = None if self.bias is None else self.bias.to(torch.float16)
        flat = _product(input.reshape(-1, self.in_features).to(torch.float16), self.weight, bias, state)
        return flat.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

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
        problem = quantized_problem(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def state_dict_problems(self, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> list[str]:
        """What is wrong with the entries that begin with ``prefix``; ``fabric.load`` asks before it writes anything."""
        if may_rename(self):
            return []
        problem = quantized_problem(state_dict, prefix)
        return [problem] if problem else list(problems_of_plain(self, state_dict, prefix, strict))

    def extra_repr(self) -> str:
        """Sizes and mode."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, state: Any) -> Tensor:
    """``x``, ``(n, in_features)`` in float16, times the weight, plus the bias."""
    # The same numbers: on CPUs training multiplies the weight in floating point, in float16 ten times slower.
    if x.device.type == "cpu" and state.is_training:
        x, bias = x.float(), None if bias is None else bias.float()
    out: Tensor = bnb.matmul(x, weight, bias=bias, state=state)
    return out


def _fresh_state(state: Any) -> Any:
    """A state with the same settings and nothing quantised."""
    fresh = bnb.MatmulLtState()
    fresh.threshold, fresh.has_fp16_weights, fresh.use_pool = state.threshold, state.has_fp16_weights, state.use_pool
    return fresh
