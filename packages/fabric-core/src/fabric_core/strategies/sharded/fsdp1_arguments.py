"""The arguments of torch's older ``FullyShardedDataParallel``, as ``fully_shard`` understands them, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.strategies.sharded.meshes import Sharding, sharding_named
from fabric_core.warnings import possible_user_warning, user_stacklevel

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

_REFUSED: Final = {
    "mesh": "pass device_mesh=...",
    "dp_mesh_dims": "pass device_mesh=(replicate, shard), or use ModelParallelStrategy for meshes with further axes",
    "module": "the module is given to fabric.setup()",
}
_SEVERAL: Final = ("ignored_modules", "ignored_states", "ignored_params")
_OF_ALL: Final = ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "use_orig_params", "sync_module_states")


@dataclass(frozen=True)
class ShardOptions:
    """Further arguments of a sharding strategy: those of ``FullyShardedDataParallel`` and those of ``fully_shard``.

    Attributes:
        process_group: the group to shard over, or the pair to shard and to replicate over.
        ignored_modules: their parameters stay whole on every rank, and their gradients each rank's own.
        ignored_states: likewise, parameters or modules.
        ignored_params: likewise, parameters.
        param_init_fn: initialises one module that was on the meta device, instead of its ``reset_parameters``.
        sync_module_states: rank 0's parameters and buffers go to every rank at set-up.
        forward_prefetch: gather the next unit's parameters before this unit's forward runs.
        backward_prefetch: gathering early in backward; ``fully_shard`` always does.
        limit_all_gathers: ``fully_shard`` always does.
        use_orig_params: parameters keep names and shapes; ``fully_shard`` always does that.
        device_id: Fabric chooses each process's device.
        reshard_after_forward: free parameters between forward and backward; a number shards them over so many
            processes only; ``None`` leaves it to the sharding strategy.
        shard_placement_fn: parameter to the dimension that it is cut along.
        mp_policy: another name for the argument ``mixed_precision``.
        offload_policy: another name for the argument ``cpu_offload``.
    """

    process_group: Any = None
    ignored_modules: Sequence[nn.Module] = ()
    ignored_states: Sequence[nn.Module | nn.Parameter] = ()
    ignored_params: Sequence[nn.Parameter] = ()
    param_init_fn: Callable[[nn.Module], None] | None = None
    sync_module_states: bool = True
    forward_prefetch: bool = False
    backward_prefetch: Any = "BACKWARD_PRE"
    limit_all_gathers: bool = True
    use_orig_params: bool = True
    device_id: Any = None
    reshard_after_forward: bool | int | None = None
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None
    mp_policy: Any = None
    offload_policy: Any = None


def read_options(owner: str, keywords: Mapping[str, Any]) -> ShardOptions:
    """The options, with a warning for each that ``fully_shard`` has no switch for.

    Args:
        owner: name of the class that got the keywords, for messages.
        keywords: by the names above.

    Raises:
        TypeError: an unknown keyword; the message has the replacement or the nearest known one.
    """
    known = ShardOptions.__dataclass_fields__
    for name in keywords:
        if name not in known:
            raise InvalidTypeError(f"{owner} takes no argument {name!r}{_hint(name, known)}.")
    listed = {name: tuple(keywords[name] or ()) for name in _SEVERAL if name in keywords}  # generators are read once
    options = ShardOptions(**{**keywords, **listed})
    for name, reason in _without_effect(options):
        possible_user_warning(
            f"{owner}({name}={getattr(options, name)!r}) has no effect: {reason}. Leave it out.",
            stacklevel=user_stacklevel(),
        )
    return options


def _hint(name: str, known: Mapping[str, Any]) -> str:
    if name in _REFUSED:
        return f": {_REFUSED[name]}"
    arguments = (*known, "auto_wrap_policy", "activation_checkpointing_policy", "sharding_strategy", "state_dict_type")
    near = difflib.get_close_matches(name, (*arguments, "cpu_offload", "mixed_precision", "device_mesh"), n=1)
    return f". Did you mean {near[0]!r}?" if near else f". It takes {', '.join(sorted(known))}"


def _without_effect(options: ShardOptions) -> Iterable[tuple[str, str]]:
    """Name of each option that asks for what ``fully_shard`` cannot do, and why nothing is lost."""
    backward = options.backward_prefetch
    if getattr(backward, "name", backward) != "BACKWARD_PRE":
        yield "backward_prefetch", "fully_shard always gathers ahead in backward, as BACKWARD_PRE does"
    if not options.limit_all_gathers:
        yield "limit_all_gathers", "fully_shard keeps memory bounded without making the CPU wait, so nothing is limited"
    if options.device_id is not None:
        yield "device_id", "each process uses the device that Fabric gave it"
    if not options.use_orig_params:
        yield "use_orig_params", "fully_shard does not flatten parameters: they always keep their names and shapes"


@dataclass(frozen=True)
class Dtypes:
    """In which dtypes the parts of a module compute.

    Attributes:
        root: for the outermost module; ``None`` for the parameters' own dtypes.
        unit: for units inside.
        buffers: floating-point buffers are cast to it at set-up; ``None`` leaves them.
        full_classes: modules of these classes compute in float32, each a unit of its own.
    """

    root: MixedPrecisionPolicy | None = None
    unit: MixedPrecisionPolicy | None = None
    buffers: torch.dtype | None = None
    full_classes: tuple[type[nn.Module], ...] = ()

    @property
    def full(self) -> MixedPrecisionPolicy | None:
        """For modules that compute in float32 amid others: inputs are cast up, outputs back."""
        if self.unit is None:
            return None
        return replace(
            self.unit, param_dtype=torch.float32, output_dtype=self.unit.param_dtype, cast_forward_inputs=True
        )

    def in_full(self, module: nn.Module) -> bool:
        """Whether the module computes in float32; those that hold tensors of 16 bits cannot."""
        if not isinstance(module, self.full_classes):
            return False
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return all(tensor.element_size() >= 4 for tensor in own if tensor.is_floating_point())


def read_mixed_precision(config: Any) -> Dtypes:
    """What torch's ``MixedPrecisionPolicy``, or the older ``MixedPrecision``, asks for; ``None`` for nothing.

    Batch normalisation cannot have parameters in one dtype and running statistics in another: it computes in float32,
    unless the older object names other classes. Buffers that this one casts are saved in the dtype they were cast to.

    Raises:
        TypeError: neither of the two.
        ValueError: ``keep_low_precision_grads=True``.
    """
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    if config is None:
        return Dtypes()
    if isinstance(config, MixedPrecisionPolicy):
        return Dtypes(config, config, full_classes=(_BatchNorm,) if _is_low(config.param_dtype) else ())
    if not isinstance(config, MixedPrecision):
        raise InvalidTypeError(
            f"mixed_precision={config!r} ({type(config).__name__}): expected a MixedPrecisionPolicy or MixedPrecision "
            'of torch.distributed.fsdp. For a precision by name pass it to Fabric: Fabric(precision="bf16-mixed").'
        )
    if config.keep_low_precision_grads:
        raise InvalidArgumentError(
            "mixed_precision=MixedPrecision(keep_low_precision_grads=True): fully_shard gives gradients the dtype of "
            'their parameters. For gradients of 16 bits use parameters of 16 bits: Fabric(precision="bf16-true").'
        )
    unit = MixedPrecisionPolicy(
        param_dtype=config.param_dtype,
        reduce_dtype=config.reduce_dtype,
        cast_forward_inputs=config.cast_forward_inputs,
    )
    root = replace(unit, cast_forward_inputs=config.cast_forward_inputs or config.cast_root_forward_inputs)
    classes = tuple(config._module_classes_to_ignore or ()) if _is_low(config.param_dtype) else ()
    return Dtypes(root, unit, config.buffer_dtype, classes)


def _is_low(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.itemsize < 4


def read_cpu_offload(config: Any, device_type: str) -> OffloadPolicy | None:
    """The policy for ``fully_shard``; ``None`` keeps everything on the device.

    Args:
        config: ``True``, ``False``, ``None``, torch's ``CPUOffload``, ``CPUOffloadPolicy`` or another policy.
        device_type: memory is pinned only where there is an accelerator to copy to.

    Raises:
        TypeError: none of these.
    """
    from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, OffloadPolicy

    if isinstance(config, CPUOffload):
        config = config.offload_params
    if config is None or config is False:
        return None
    if config is True:
        return CPUOffloadPolicy(pin_memory=device_type != "cpu")
    if not isinstance(config, OffloadPolicy):
        raise InvalidTypeError(
            f"cpu_offload={config!r} ({type(config).__name__}): expected True, False, or a CPUOffload, "
            "CPUOffloadPolicy or OffloadPolicy of torch.distributed.fsdp."
        )
    if isinstance(config, CPUOffloadPolicy) and device_type == "cpu":
        return replace(config, pin_memory=False)
    return config


def read_overrides(overrides: Mapping[str, Any], sharding: Sharding, device_type: str) -> dict[str, Any]:
    """What a policy asks for one unit alone, as keywords of ``fully_shard``.

    Raises:
        ValueError: something that one unit cannot have for itself.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

    own: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in ("mixed_precision", "mp_policy"):
            own["mp_policy"] = read_mixed_precision(value).unit or MixedPrecisionPolicy()
        elif name in ("cpu_offload", "offload_policy"):
            own["offload_policy"] = read_cpu_offload(value, device_type) or OffloadPolicy()
        elif name in ("reshard_after_forward", "shard_placement_fn"):
            own[name] = value
        elif name == "sharding_strategy":
            own["reshard_after_forward"] = _reshards(value, sharding)
        elif name not in _OF_ALL:
            raise InvalidArgumentError(
                f"A policy asks for {name}={value!r} for one unit. A unit can have its own mixed_precision, "
                "cpu_offload, sharding_strategy, reshard_after_forward and shard_placement_fn."
            )
    return own


def _reshards(strategy: Any, sharding: Sharding) -> bool | None:
    own = sharding_named(strategy)
    if (own.axes, own.whole) != (sharding.axes, sharding.whole):
        raise InvalidArgumentError(
            f"A policy asks for sharding_strategy={own.name!r} for one unit, while the others have {sharding.name!r}. "
            "All units are spread over the same mesh: they can differ in when parameters are freed only, as FULL_SHARD "
            "and SHARD_GRAD_OP do."
        )
    return own.reshard_after_forward


def ignored_places(options: ShardOptions, root: nn.Module) -> tuple[set[nn.Module], set[tuple[nn.Module, str]]]:
    """The modules to leave alone, with all inside them, and where the parameters to leave alone stand.

    Parameters are given by module and name, because those without memory are replaced when they get some.

    Raises:
        TypeError: something that is neither a module nor a parameter.
    """
    modules: set[nn.Module] = set()
    parameters: set[int] = set()
    for name in _SEVERAL:
        for one in getattr(options, name):
            if isinstance(one, nn.Parameter):
                parameters.add(id(one))
            elif isinstance(one, nn.Module):
                modules.update(one.modules())
            else:
                raise InvalidTypeError(f"{name} holds {one!r} ({type(one).__name__}), no module and no parameter.")
    places = {
        (module, name)
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if module in modules or id(parameter) in parameters
    }
    return modules, places
