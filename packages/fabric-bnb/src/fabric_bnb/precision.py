"""The precision: linear layers of few bits, everything else in the dtype that it has."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fabric_bnb import backend, conversion
from fabric_bnb.linear import PLAIN
from fabric_bnb.modes import Mode, ModeName, find_mode
from fabric_bnb.replacing import LinearReplaced
from fabric_core.abc.communicator import Communicator
from fabric_core.abc.precision import Precision
from fabric_core.accelerator_of_torch import accelerator_of_torch
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UsageError
from fabric_core.keywords import accepted
from fabric_core.precision.casting import DefaultDtype, cast_floats
from fabric_core.strategies.sharded.agreement import make_equal
from fabric_core.warnings import possible_user_warning


class BitsandbytesPrecision(Precision):
    """Linear layers with weights of 4 or 8 bits, made by bitsandbytes.

    ``setup`` replaces every ``torch.nn.Linear`` and quantises its weight on the device, one layer at a time. These
    weights are frozen; biases and all other parameters keep their dtype and are trained as ever. With
    ``"int8-training"`` weights stay in float16, take gradients, and are quantised anew for each product.

    Inputs of the model are converted to ``dtype``, outputs to torch's default dtype. Layers that are not quantised get
    their inputs in their own dtype.

    Args:
        mode: ``"nf4"``, ``"nf4-dq"``, ``"fp4"``, ``"fp4-dq"``, ``"int8"`` or ``"int8-training"``.
        dtype: what quantised layers compute in. By default float16 for 8 bits, which take no other; for 4 bits
            bfloat16 if the device computes in it, float16 otherwise.
        ignore_modules: names of modules whose linear layers stay as they are; each stands for all inside it too.
        device: type of the device it is for, as ``Fabric(...)`` passes it; torch's accelerator or the CPU if not given.

    Raises:
        ValueError: another mode, or a dtype that the mode cannot compute in.
        TypeError: ``ignore_modules`` is no collection of names.
        ImportError: bitsandbytes is missing, or cannot be used.
    """

    supported_accelerators: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda", "xpu", "hpu"})

    def __init__(
        self,
        mode: ModeName,
        dtype: torch.dtype | None = None,
        ignore_modules: Iterable[str] | None = None,
        *,
        device: str | None = None,
    ) -> None:
        self.mode: Mode = find_mode(mode)
        self.precision = f"bnb-{mode}"
        self.ignore_modules = _names(ignore_modules)
        self._dtype = _checked_dtype(self.mode, dtype)
        self._device = device
        self._replaced: list[weakref.ref[torch.Tensor]] = []
        backend.load(device or "cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replaced": []}  # weak references to what is in this process

    @classmethod
    def nf4(cls, device: str | None = None) -> BitsandbytesPrecision:
        """``"bnb-nf4"``: 4 bits whose values suit weights that are normally distributed."""
        return cls("nf4", device=device)

    @classmethod
    def nf4_dq(cls, device: str | None = None) -> BitsandbytesPrecision:
        """``"bnb-nf4-dq"``: the same, and the scales are quantised too."""
        return cls("nf4-dq", device=device)

    @classmethod
    def fp4(cls, device: str | None = None) -> BitsandbytesPrecision:
        """``"bnb-fp4"``: floating-point numbers of 4 bits."""
        return cls("fp4", device=device)

    @classmethod
    def fp4_dq(cls, device: str | None = None) -> BitsandbytesPrecision:
        """``"bnb-fp4-dq"``: the same, and the scales are quantised too."""
        return cls("fp4-dq", device=device)

    @classmethod
    def int8(cls, device: str | None = None) -> BitsandbytesPrecision:
        """``"bnb-int8"``: 8 bits, with float16 around them."""
        return cls("int8", device=device)

    @classmethod
    def int8_training(cls, device: str | None = None) -> BitsandbytesPrecision:
        """``"bnb-int8-training"``: trainable float16 weights that are multiplied in 8 bits."""
        return cls("int8-training", device=device)

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]
        """What quantised layers compute in. Without one given, asks the device, so not before it is set up."""
        if self._dtype is None:
            self._dtype = torch.bfloat16 if _computes_in_bfloat16(self._device) else torch.float16
        return self._dtype

    @property
    def dtype(self) -> torch.dtype:
        """The same as ``compute_dtype``."""
        return self.compute_dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Put quantised layers in the place of linear ones, unquantised yet; the module itself unless it is linear.

        A module that holds quantised layers already, as one built under ``init_module``, keeps the linear layers that
        it has beside them, such as adapters. Those that are quantised in another mode stay so, with a warning.

        Raises:
            TypeError: there is no linear layer to quantise.
        """
        if conversion.has_quantized(module):
            self._warn_of_other_modes(module)
        else:
            self._warn_of_unused_names(module)
            found = conversion.replaceable(module, self.ignore_modules)
            if not found:
                raise InvalidTypeError(self._nothing_to_quantize(module))
            if not self.mode.trainable:
                self._replaced.extend(weakref.ref(linear.weight) for linear in found.values())
            make = partial(self._layer_class().of, **self._settings())
            module = conversion.replace(module, list(found.values()), make)
        conversion.keep_shared(module)
        conversion.check_not_borrowed(module)
        conversion.set_compute_dtype(module, self.compute_dtype)
        conversion.feed_own_dtype(module, self.compute_dtype)
        return module

    def convert_placed_module(self, module: nn.Module, ranks: Communicator) -> None:
        """Quantise what is not quantised yet, and bring rank 0's quantised weights to all ranks. Every rank calls it.

        Raises:
            RuntimeError: a weight has no memory; or ranks have built different modules, on all of them.
        """
        layers = conversion.quantized_layers(module)
        for layer in layers:
            layer.quantize()
        conversion.place_foreign(module, ranks.root_device)
        if ranks.world_size > 1:
            quantized = [layer for layer in layers if layer.is_quantized]
            make_equal([t for layer in quantized for t in (layer.held()[0], *layer.statistics())], ranks.root_device)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New floating-point tensors have the compute dtype."""
        return DefaultDtype(self.compute_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """``torch.nn.Linear(...)`` makes quantised layers; other new parameters have the compute dtype.

        Values are drawn as usual and quantised by ``setup``. Where none are to be drawn, the quantised layers have
        their small memory at once, and NaN in it until a checkpoint is loaded.

        Raises:
            RuntimeError: modules are to be ignored, whose names are not known before they are built.
        """
        if self.ignore_modules:
            raise UsageError(
                f"fabric.init_module() builds all linear layers quantised and cannot know which will be named "
                f"{', '.join(sorted(self.ignore_modules))}. Build the module outside of it; fabric.setup() will leave "
                "these as they are."
            )
        return self._building()

    @contextmanager
    def _building(self) -> Iterator[None]:
        make = partial(_made, self._layer_class(), self._settings())
        with DefaultDtype(self.compute_dtype), LinearReplaced(make):
            yield

    def forward_context(self) -> AbstractContextManager[Any]:
        """Tensors that forward creates have the compute dtype."""
        return DefaultDtype(self.compute_dtype)

    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors to the compute dtype."""
        return cast_floats(data, self.compute_dtype)

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors to torch's default dtype."""
        return cast_floats(data, torch.get_default_dtype())

    def lost_parameters(self, optimizers: Iterable[Any]) -> int:
        """How many parameters of the optimizers are weights that ``convert_module`` has replaced by frozen ones."""
        replaced = {id(weight) for weight in (reference() for reference in self._replaced) if weight is not None}
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        return sum(id(parameter) in replaced for group in groups for parameter in group["params"])

    def _layer_class(self) -> Any:
        if self.mode.bits == 4:
            from fabric_bnb.linear4bit import QuantizedLinear4bit

            return QuantizedLinear4bit
        from fabric_bnb.linear8bit import QuantizedLinear8bit, TrainableLinear8bit

        return TrainableLinear8bit if self.mode.trainable else QuantizedLinear8bit

    def _settings(self) -> dict[str, Any]:
        if self.mode.bits == 4:
            mode = self.mode
            return {"quant_type": mode.quant_type, "nested": mode.nested, "compute_dtype": self.compute_dtype}
        return {}

    def _nothing_to_quantize(self, module: nn.Module) -> str:
        linear = [name or "the module itself" for name, part in module.named_modules() if isinstance(part, PLAIN)]
        start = f"precision={self.precision!r} quantises torch.nn.Linear layers, and {type(module).__name__} has none"
        if not linear:
            return f"{start}. Use another precision for it, such as 'bf16-true'."
        return (
            f"{start} to quantise: {', '.join(linear[:5])} {'is' if len(linear) == 1 else 'are'} ignored, of a "
            "subclass with code of its own, or shares its weight with another layer. Use another precision for it."
        )

    def _warn_of_other_modes(self, module: nn.Module) -> None:
        modes = {name: getattr(part, "mode", None) for name, part in module.named_modules() if conversion.is_own(part)}
        others = [f"{name or 'the module itself'} ({mode})" for name, mode in modes.items() if mode != self.mode.name]
        if others:
            possible_user_warning(
                f"{len(others)} layers were quantised in another mode and stay in it, whatever precision="
                f"{self.precision!r} says: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}. For this "
                "precision, build the module anew and load its weights in floating point."
            )

    def _warn_of_unused_names(self, module: nn.Module) -> None:
        names = [name for name, _ in module.named_modules()]
        unused = [i for i in sorted(self.ignore_modules) if not any(conversion.is_ignored(n, (i,)) for n in names)]
        if unused:
            possible_user_warning(
                f"ignore_modules names {', '.join(map(repr, unused))}, but {type(module).__name__} has no such part. "
                f"It has {', '.join(name for name, _ in module.named_children())}."
            )


def _made(cls: Any, settings: dict[str, Any], /, *args: Any, **kwargs: Any) -> nn.Module:
    layer: nn.Module = cls(*args, **kwargs, **settings)
    return layer


def _names(ignore_modules: Iterable[str] | None) -> frozenset[str]:
    if isinstance(ignore_modules, str) or not isinstance(ignore_modules, Iterable | None):
        example = ignore_modules if isinstance(ignore_modules, str) else "head"
        raise InvalidTypeError(
            f"ignore_modules={ignore_modules!r}: expected a collection of names, such as {{{example!r}}}."
        )
    names = frozenset(() if ignore_modules is None else ignore_modules)
    if not all(isinstance(name, str) and name for name in names):
        raise InvalidTypeError(f"ignore_modules={ignore_modules!r}: expected names of modules.")
    return names


def _checked_dtype(mode: Mode, dtype: torch.dtype | None) -> torch.dtype | None:
    if mode.bits == 8:
        if dtype not in (None, torch.float16):
            raise InvalidArgumentError(
                f"BitsandbytesPrecision({mode.name!r}, dtype={dtype}): 8-bit products take and give torch.float16 "
                "only. Leave dtype out, or use a mode of 4 bits."
            )
        return torch.float16
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise InvalidArgumentError(
            f"BitsandbytesPrecision({mode.name!r}, dtype={dtype}): expected torch.bfloat16, torch.float16 or "
            "torch.float32."
        )
    return dtype


def _computes_in_bfloat16(device_type: str | None) -> bool:
    """Whether the device's own arithmetic knows it; every CPU does well enough."""
    if device_type is None:
        found = accelerator_of_torch()
        device_type = "cpu" if found is None else found.type
    if device_type == "cpu":
        return True
    ask = getattr(torch.get_device_module(device_type), "is_bf16_supported", None)
    return True if ask is None else bool(ask(**accepted(ask, {"including_emulation": False})))
