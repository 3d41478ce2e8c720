"""Precision of models whose parameters are split over processes, and the gradient scaler that all ranks agree with."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fabric_core.abc.precision import Precision
from fabric_core.distributed.group import is_initialized
from fabric_core.errors import InvalidArgumentError
from fabric_core.precision.casting import DefaultDtype, cast_floats
from fabric_core.precision.half import HalfPrecision
from fabric_core.precision.mixed import MixedPrecision
from fabric_core.precision.scaled import ScaledPrecision

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

Name = Literal["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]
_DTYPES: Final = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}


class FSDPPrecision(ScaledPrecision):
    """The dtypes of a model that ``fully_shard`` splits.

    Mixed: parameters stay in float32 and are gathered in 16 bits; compute is in 16 bits under autocast; gradients are
    summed in float32. True: everything is in one dtype. ``"16-mixed"`` adds a gradient scaler: where gradients of one
    rank are not finite, no rank takes the step.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.
        scaler: to use instead of a default one, for ``"16-mixed"`` only.
        device: type of device whose operations are cast; the strategy's by default.
    """

    def __init__(
        self, precision: Name = "32-true", scaler: GradScaler | None = None, device: str | None = None
    ) -> None:
        if precision not in _DTYPES:
            raise InvalidArgumentError(f"FSDPPrecision({precision!r}): expected one of {sorted(_DTYPES)}.")
        if scaler is not None and precision != "16-mixed":
            raise InvalidArgumentError(
                f"FSDPPrecision({precision!r}) takes no scaler: only '16-mixed' scales gradients. Leave scaler out, or "
                "use '16-mixed'."
            )
        super().__init__(sharded_scaler(scaler, device or "cpu") if precision == "16-mixed" else None)
        self.precision = precision
        self.device = device
        self.compute_dtype = _DTYPES[precision]
        self._mixed, self._half = precision.endswith("-mixed"), precision in ("16-true", "bf16-true")

    @classmethod
    def float16(cls, device: str | None = None) -> FSDPPrecision:
        """``"16-true"``."""
        return cls("16-true", device=device)

    @classmethod
    def bfloat16(cls, device: str | None = None) -> FSDPPrecision:
        """``"bf16-true"``."""
        return cls("bf16-true", device=device)

    @classmethod
    def mixed_float16(cls, device: str | None = None) -> FSDPPrecision:
        """``"16-mixed"`` with a default scaler."""
        return cls("16-mixed", device=device)

    @classmethod
    def mixed_bfloat16(cls, device: str | None = None) -> FSDPPrecision:
        """``"bf16-mixed"``."""
        return cls("bf16-mixed", device=device)

    @property
    def changes_forward(self) -> bool:
        """All but ``"32-true"`` do."""
        return self._mixed or self._half

    @property
    def mixed_precision_config(self) -> MixedPrecisionPolicy:
        """What ``fully_shard`` is told: the dtypes of gathered parameters and of the sums of gradients."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self._mixed:
            return MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        if self._half:
            return MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=self.compute_dtype)
        return MixedPrecisionPolicy()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Floating-point parameters and buffers in 16 bits if all is to be; otherwise the module as it is."""
        return HalfPrecision(self.precision).convert_module(module) if self._half else module  # type: ignore[arg-type]

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New floating-point tensors have 16 bits if all have."""
        return DefaultDtype(self.compute_dtype) if self._half else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """New parameters have 16 bits if all have."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for mixed precision, the default dtype for 16 bits."""
        if self._mixed:
            return torch.autocast(self.device or "cpu", dtype=self.compute_dtype)
        return self.tensor_init_context()

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to float32 for mixed precision, to 16 bits if all have them."""
        return cast_floats(data, torch.float32 if self._mixed else self.compute_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())


class ShardedGradScaler(GradScaler):
    """A gradient scaler for gradients of which each process holds a part.

    Every rank unscales its parts, wherever they are; a value that is not finite on one rank counts on all, so that
    all skip the step and change the scale alike. Every rank steps as often as the others.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        with torch.no_grad():
            for (device, _), grads in _local_gradients(optimizer, allow_fp16).items():
                found = found_inf if device == found_inf.device else found_inf.to(device, copy=True)
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inv_scale.to(device))
                if found is not found_inf:
                    found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.device)))
            if is_initialized():
                dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


def _local_gradients(optimizer: Optimizer, allow_fp16: bool) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """This process's parts of the gradients, by device and dtype; parts without elements are left out."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.dtype is torch.float16 and not allow_fp16:
                raise InvalidArgumentError(
                    "Gradients in float16 cannot be unscaled: the parameters must be in float32. Do not convert the "
                    "module to half precision, or use precision='16-true'."
                )
            to_local = getattr(grad, "to_local", None)
            part = grad if to_local is None else to_local()
            if part.is_sparse:
                part = part._values()
            if part.numel():
                found[part.device, part.dtype].append(part)
    return found


def sharded_scaler(scaler: GradScaler | None = None, device: str = "cpu") -> GradScaler:
    """A scaler that all ranks agree with, with the settings of ``scaler``.

    A scaler of a class of its own is taken as it is: it has to find agreement itself.
    """
    if scaler is None:
        return ShardedGradScaler(device)
    if type(scaler) is not GradScaler:
        return scaler  # ours included
    made = ShardedGradScaler(device, enabled=scaler.is_enabled())
    if scaler.is_enabled():
        made.load_state_dict(scaler.state_dict())
    return made


def sharded_float16(device: str = "cpu") -> MixedPrecision:
    """``"16-mixed"`` for parameters that are split by other means than ``fully_shard``'s own mixed precision."""
    return MixedPrecision("16-mixed", device, ShardedGradScaler(device))


def adapt(precision: Precision, device: str) -> None:
    """Make a precision that was created without knowing the strategy fit a sharded one on ``device``, in place."""
    if isinstance(precision, ScaledPrecision) and precision.scaler is not None:
        precision.scaler = sharded_scaler(precision.scaler, device)
    if isinstance(precision, FSDPPrecision) and precision.device is None:
        precision.device = device
