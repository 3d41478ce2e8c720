"""Deciding, before anything is written, what of a checkpoint goes straight into the memory of live objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from fabric_core.checkpoint.dtensors import empty_like, local_of
from fabric_core.checkpoint.lazy import OpenCheckpoint, is_plain_tensor, span
from fabric_core.checkpoint.portable import clean_keys
from fabric_core.checkpoint.self_loading import loads_itself, own_problems, self_loading
from fabric_core.checkpoint.sharded.boxes import is_dtensor
from fabric_core.checkpoint.tree import leaves, replaced
from fabric_core.errors import CheckpointError, CheckpointKeyError


@dataclass
class Transfer:
    """One tensor of the checkpoint and the live memory that it belongs in; ``holder[key]`` is its place in the state.

    ``live`` may be spread over ranks: then its memory is this rank's part of it.
    """

    holder: Any
    key: Any
    window: Tensor
    live: Tensor

    @property
    def local(self) -> Tensor:
        """The live memory of this rank."""
        return local_of(self.live)

    def memory(self) -> tuple[str, int, int]:
        """Device, first byte and end of the live memory."""
        local = self.local
        start = local.data_ptr()
        return str(local.device), start, start + span(local) * local.element_size()


@dataclass
class Plan:
    """What to load into one object, and which of its tensors to read straight into live memory first.

    Carrying it out cannot fail for reasons that could be known before.

    Attributes:
        state: the state to load, in the form that the object takes.
        transfers: tensors of ``state`` with a place in live memory.
        implicit: ``state`` will hold whole tensors for parameters that are spread over ranks.
    """

    state: Any
    transfers: list[Transfer] = field(default_factory=list)
    implicit: bool = False

    def carry_out(self, source: OpenCheckpoint) -> None:
        """Read into live memory, and put the live tensors in the state in place of the windows."""
        # Of tensors that overlap and are not the same, which one wins is for the object's own loading to say. Of
        # several for the same one, the last wins there too.
        groups = [group for group in _by_memory(self.transfers) if len({_view(other.local) for other in group}) == 1]
        source.read([(group[-1].window, group[-1].live) for group in groups])
        for group in groups:
            for transfer in group:
                transfer.holder[transfer.key] = transfer.live


def plan_module(
    source: OpenCheckpoint, module: nn.Module, saved: Any, live: Mapping[str, Any], strict: bool, name: str
) -> Plan:
    """What of ``saved`` to read straight into ``live``, the module's state dict.

    Raises:
        CheckpointKeyError: keys that differ, if ``strict``; all of them are named.
        CheckpointError: shapes that differ, parameters without memory, or no state of a module at all.
    """
    saved = clean_keys(saved)
    if not isinstance(saved, MutableMapping):
        raise CheckpointError(f"{name} is a {type(saved).__name__} in the checkpoint, not the state of a module.")
    elsewhere = _memory_loaded_by_custom_code(module)
    # Custom code may rename and reshape: of what is below it, only that code can tell what fits.
    custom = self_loading(module)
    below, problems = tuple(prefix for prefix, _ in custom), list(own_problems(custom, saved, strict))
    _check_fit(module, _without(saved, below), _without(live, below), problems, strict, name)
    plan = Plan(saved, implicit=bool(elsewhere) and any(map(is_dtensor, live.values())))
    for key, target in live.items():
        window = saved.get(key)
        if (
            isinstance(window, Tensor)
            and (source.is_window(window) or is_dtensor(target))
            and (is_dtensor(target) or is_plain_tensor(target))
            and target.device.type != "meta"
            and window.shape == target.shape
            and window.is_complex() == target.is_complex()
            and local_of(target).data_ptr() not in elsewhere
        ):
            plan.transfers.append(Transfer(saved, key, window, target))
    return plan


def plan_values(source: OpenCheckpoint, live: Any, saved: Any) -> Plan:
    """For what is neither a module nor an optimizer: tensors that are spread in ``live`` are to be spread alike.

    The plan's ``state`` is a list with the value as its one item.
    """
    plan = Plan([source.values(saved)])
    if any(is_dtensor(leaf) for _, leaf in leaves(live, "")):
        plan.state = replaced(plan.state, lambda leaf: leaf)  # others may use the containers
        plan.transfers.extend(_alike(plan.state, 0, live))
    return plan


def _alike(holder: Any, key: Any, live: Any) -> Iterator[Transfer]:
    value = holder[key]
    if is_dtensor(live) and isinstance(value, Tensor) and value.shape == live.shape:
        yield Transfer(holder, key, value, empty_like(live, value.shape, value.dtype))
    elif isinstance(live, Mapping) and isinstance(value, dict):
        for name in value.keys() & live.keys():
            yield from _alike(value, name, live[name])
    elif isinstance(live, list) and isinstance(value, list):
        for index, item in enumerate(live[: len(value)]):
            yield from _alike(value, index, item)


def _memory_loaded_by_custom_code(module: nn.Module) -> set[int]:
    """Addresses of tensors that a module's own loading code or a hook sees: it is to find the old values there."""
    addresses: set[int] = set()
    for child in module.modules():
        if loads_itself(child):
            addresses.add(0)  # even a module without tensors may rename keys
            addresses.update(map(_address, chain(child.parameters(), child.buffers(), _further_state(child))))
    return addresses


def _further_state(module: nn.Module) -> list[Tensor]:
    """What else a module with saving code of its own puts into its state, as the scales of a quantised weight."""
    if all(type(part)._save_to_state_dict is nn.Module._save_to_state_dict for part in module.modules()):
        return []
    return [value for value in module.state_dict().values() if isinstance(value, Tensor)]


def _address(tensor: Tensor) -> int:
    try:
        return int(local_of(tensor).data_ptr())
    except RuntimeError:  # some classes of tensors have no memory of their own
        return 0


def _check_fit(
    module: nn.Module,
    saved: Mapping[str, Any],
    live: Mapping[str, Any],
    own: list[str],
    strict: bool,
    name: str,
) -> None:
    # Batch norms of old torch versions did not count batches; loading fills that in.
    missing = [key for key in live if key not in saved and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in saved if key not in live]
    shapes = [
        f"{key} is {tuple(value.shape)} in the checkpoint and {tuple(live[key].shape)} in the module"
        for key, value in saved.items()
        if isinstance(value, Tensor) and _has_shape(live.get(key)) and not _fits(value, live[key])
    ]
    hollow = [key for key in saved if isinstance(live.get(key), Tensor) and live[key].is_meta]
    problems = [f"different shapes: {'; '.join(shapes)}"] if shapes else []
    if hollow:
        problems.append(
            f"without memory to load into (on the meta device, set the module up first): {', '.join(hollow)}"
        )
    if strict and missing:
        problems.append(f"missing in the checkpoint: {', '.join(missing)}")
    if strict and unexpected:
        problems.append(f"unknown to the module: {', '.join(unexpected)}")
    if not problems and not own:
        return
    sentences = [problem[0].upper() + problem[1:] for problem in problems] + own
    message = f"{name} does not fit {type(module).__name__}. Nothing was loaded. " + ". ".join(sentences)
    if shapes or hollow or own:
        raise CheckpointError(message + ".")
    raise CheckpointKeyError(message + ". Pass strict=False to load what both have.")


def _without(state: Mapping[str, Any], prefixes: tuple[str, ...]) -> Mapping[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else state


def _has_shape(live: Any) -> bool:
    return is_plain_tensor(live) or is_dtensor(live)


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
