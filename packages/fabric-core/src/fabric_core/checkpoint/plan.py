"""Deciding, before anything is written, what of a checkpoint goes straight into the memory of live objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.checkpoint.lazy import OpenCheckpoint, in_parallel, is_plain_tensor, span
from fabric_core.errors import CheckpointError, CheckpointKeyError


@dataclass
class Transfer:
    """One tensor of the file and the live memory that it belongs in; ``holder[key]`` is its place in the content."""

    holder: MutableMapping[Any, Any]
    key: Any
    window: Tensor
    live: Tensor

    def memory(self) -> tuple[str, int, int]:
        """Device, first byte and end of the live memory."""
        start = self.live.data_ptr()
        return str(self.live.device), start, start + span(self.live) * self.live.element_size()

    def same_as(self, other: Transfer) -> bool:
        """Whether both bring the same bytes of the file to the same place."""
        return _view(self.live) == _view(other.live) and _view(self.window) == _view(other.window)


@dataclass
class Plan:
    """The transfers into one object. Carrying them out cannot fail for reasons that could be known before."""

    transfers: list[Transfer] = field(default_factory=list)

    def carry_out(self, source: OpenCheckpoint) -> None:
        """Read the file into live memory, and put the live tensors in the content in place of the windows."""
        # Of tensors that overlap and differ, which one wins is for the object's own loading to say.
        groups = [group for group in _by_memory(self.transfers) if all(group[0].same_as(other) for other in group[1:])]
        size = sum(group[0].window.nbytes for group in groups)
        in_parallel(lambda group: source.read_into(group[0].window, group[0].live), groups, size)
        for group in groups:
            for transfer in group:
                transfer.holder[transfer.key] = transfer.live


def plan_module(
    source: OpenCheckpoint, module: nn.Module, saved: Any, live: Mapping[str, Any], strict: bool, name: str
) -> Plan:
    """What of ``saved`` to read straight into ``live``, the module's state dict.

    Raises:
        CheckpointKeyError: keys that differ, if ``strict``; all of them are named.
        CheckpointError: shapes that differ, or no state of a module at all.
    """
    if not isinstance(saved, MutableMapping):
        raise CheckpointError(f"{name} is a {type(saved).__name__} in the checkpoint, not the state of a module.")
    elsewhere = _memory_loaded_by_custom_code(module)
    if not elsewhere:  # custom code may rename and reshape: then only loading itself can tell what fits
        _check_fit(module, saved, live, strict, name)
    plan = Plan()
    for key, target in live.items():
        window = saved.get(key)
        if (
            isinstance(window, Tensor)
            and source.is_window(window)
            and is_plain_tensor(target)
            and target.device.type != "meta"
            and window.shape == target.shape
            and window.is_complex() == target.is_complex()
            and target.data_ptr() not in elsewhere
        ):
            plan.transfers.append(Transfer(saved, key, window, target))
    return plan


def plan_optimizer(source: OpenCheckpoint, optimizer: Optimizer, saved: Any, name: str) -> Plan:
    """What of ``saved`` to read straight into the optimizer's state tensors.

    ``CheckpointError`` if ``saved`` belongs to an optimizer with other parameter groups.
    """
    plan = Plan()
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict or _has_pre_hooks(optimizer):
        return plan
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise CheckpointError(f"{name} is not the state of an optimizer in the checkpoint.")
    have = [len(group["params"]) for group in optimizer.param_groups]
    stored = [len(group["params"]) for group in saved["param_groups"]]
    if have != stored:
        raise CheckpointError(
            f"{name}: the checkpoint has parameter groups of {stored} parameters, {type(optimizer).__name__} has "
            f"{have}. Nothing was loaded. Create the optimizer from the same parameters as when it was saved."
        )
    ids = [id_ for group in saved["param_groups"] for id_ in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for id_, parameter in zip(ids, parameters, strict=True):
        entries = saved["state"].get(id_)
        if isinstance(entries, dict):
            plan.transfers.extend(_optimizer_transfers(source, entries, parameter, optimizer.state.get(parameter)))
    return plan


def _optimizer_transfers(
    source: OpenCheckpoint, entries: dict[Any, Any], parameter: Tensor, state: Any
) -> Iterator[Transfer]:
    for key, window in entries.items():
        if not isinstance(window, Tensor) or not source.is_window(window) or not source.is_alone(window):
            continue
        live: Any = state.get(key) if isinstance(state, Mapping) else None
        if not (
            is_plain_tensor(live)
            and not live.requires_grad
            and (live.shape, live.dtype) == (window.shape, window.dtype)
            and live.device.type != "meta"
        ):
            # No state yet. On other devices: go there tensor by tensor, not through a full copy in host memory.
            # Only `step` may belong on the CPU, which the optimizer decides.
            if parameter.device.type in ("cpu", "meta") or key == "step":
                continue
            live = torch.empty_like(window, device=parameter.device)
        yield Transfer(entries, key, window, live)


def _has_pre_hooks(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))


def _memory_loaded_by_custom_code(module: nn.Module) -> set[int]:
    """Addresses of tensors that a module's own loading code or a hook sees: it is to find the old values there."""
    addresses: set[int] = set()
    for child in module.modules():
        if _loads_itself(child):
            addresses.add(0)  # even a module without tensors may rename keys
            addresses.update(tensor.data_ptr() for tensor in child.parameters() if is_plain_tensor(tensor))
            addresses.update(tensor.data_ptr() for tensor in child.buffers() if is_plain_tensor(tensor))
    return addresses


def _loads_itself(module: nn.Module) -> bool:
    if getattr(module, "_load_state_dict_pre_hooks", None):
        return True
    for method in ("load_state_dict", "_load_from_state_dict"):
        if method in vars(module):
            return True
        own = getattr(type(module), method)
        # The modules of torch.nn only add entries that old checkpoints lack.
        if own is not getattr(nn.Module, method) and not own.__module__.startswith("torch.nn.modules."):
            return True
    return False


def _check_fit(module: nn.Module, saved: Mapping[str, Any], live: Mapping[str, Any], strict: bool, name: str) -> None:
    # Batch norms of old torch versions did not count batches; loading fills that in.
    missing = [key for key in live if key not in saved and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in saved if key not in live]
    shapes = [
        f"{key} is {tuple(value.shape)} in the checkpoint and {tuple(live[key].shape)} in the module"
        for key, value in saved.items()
        if isinstance(value, Tensor) and is_plain_tensor(live.get(key)) and not _fits(value, live[key])
    ]
    problems = [f"different shapes: {'; '.join(shapes)}"] if shapes else []
    if strict and missing:
        problems.append(f"missing in the checkpoint: {', '.join(missing)}")
    if strict and unexpected:
        problems.append(f"unknown to the module: {', '.join(unexpected)}")
    if not problems:
        return
    message = f"{name} does not fit {type(module).__name__}. Nothing was loaded. " + ". ".join(
        problem[0].upper() + problem[1:] for problem in problems
    )
    if shapes:
        raise CheckpointError(message + ".")
    raise CheckpointKeyError(message + ". Pass strict=False to load what both have.")


def _fits(value: Tensor, live: Tensor) -> bool:
    # torch takes the single element of a vector for a scalar, as files of torch 0.3 have it.
    return value.shape == live.shape or (live.dim() == 0 and value.shape == (1,))


def _by_memory(transfers: list[Transfer]) -> Iterator[list[Transfer]]:
    """Transfers in groups whose live memory overlaps; most groups have one member."""
    group: list[Transfer] = []
    device, end = "", 0
    for (where, first, last), transfer in sorted(((t.memory(), t) for t in transfers), key=itemgetter(0)):
        if group and (where != device or first >= end):
            yield group
            group = []
        end = max(end, last) if group else last
        device = where
        group.append(transfer)
    if group:
        yield group


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
