"""Creating modules cheaply: without drawing weights that a checkpoint will replace, or without memory at first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fabric_core.errors import InvalidTypeError
from fabric_core.types import Device

# The functions of torch.nn.init that end in one fill of their tensor without asking the function mode first.
_ONE_FILL = ("kaiming_normal_", "_no_grad_uniform_", "_no_grad_normal_", "_no_grad_fill_", "_no_grad_zero_")
_FILLS = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_})


class EmptyInit(TorchFunctionMode):
    """Inside the ``with`` block the functions of ``torch.nn.init`` return their tensor as it is, filled or not.

    Layers then cost their memory only, and hold whatever was in it: load a checkpoint into them. Other ways to fill a
    tensor work as ever, so buffers and hand-written initialisation keep their values, and so does ``eye_``, which costs
    nothing. ``enabled=False`` makes the block do nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self._one_fill = {getattr(nn.init, name).__code__ for name in _ONE_FILL if hasattr(nn.init, name)}

    def __enter__(self) -> EmptyInit:
        if self.enabled:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.enabled:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        caller = sys._getframe(1)
        if caller.f_globals is vars(nn.init):
            if func in _FILLS and caller.f_code in self._one_fill:
                return args[0]
            # Functions that draw by rejection or factorise would go wrong with skipped fills, but they leave a tensor
            # without storage alone: say that this is one.
            if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return True
        return func(*args, **kwargs)


def has_meta_parameters(obj: nn.Module | Optimizer) -> bool:
    """Whether any parameter or buffer of a module, or any parameter of an optimizer, has no storage yet."""
    if isinstance(obj, Optimizer):
        return any(parameter.is_meta for group in obj.param_groups for parameter in group["params"])
    if isinstance(obj, nn.Module):
        return any(tensor.is_meta for tensor in chain(obj.parameters(), obj.buffers()))
    raise InvalidTypeError(f"Expected a torch.nn.Module or a torch.optim.Optimizer, got {type(obj).__name__}.")


def materialize_meta(module: nn.Module, device: Device) -> None:
    """Give every meta tensor in ``module`` storage on ``device`` and its initial value; tied parameters stay tied.

    Values come from the submodules' ``reset_parameters()``, called once for each that owned a meta tensor, after all
    storage is there; children before parents, as in constructors. Tensors that had storage keep it.

    Raises:
        InvalidTypeError: submodules without that method own meta tensors; nothing was changed.
    """
    owners = {name: sub for name, sub in module.named_modules() if any(t.is_meta for _, _, t in own_tensors(sub))}
    helpless = [
        f"{name or 'the module itself'} ({type(sub).__name__})" for name, sub in owners.items() if not reset_method(sub)
    ]
    if helpless:
        raise InvalidTypeError(
            f"Cannot initialise meta tensors of: {', '.join(helpless)}. Give each class a method `reset_parameters()` "
            "that fills its own parameters and buffers, or create the module on a real device."
        )
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    before = [tensor for sub in owners.values() for _, _, tensor in own_tensors(sub)]  # keeps the ids below unique
    for sub in owners.values():
        for table, name, tensor in own_tensors(sub):
            places.setdefault(id(tensor), []).append((table, name))
    for sub in owners.values():
        # `_apply` is the one way that sharding wrappers follow when tensors are replaced.
        sub._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t, recurse=False)
    del before
    for (table, name), *others in places.values():
        for other_table, other_name in others:
            other_table[other_name] = table[name]
    meant = set(owners.values())
    for sub in children_first(module):
        reset = reset_method(sub) if sub in meant else None
        if reset is not None:
            reset()


def children_first(module: nn.Module, without: Set[nn.Module] = frozenset()) -> list[nn.Module]:
    """``module`` and its submodules, each once and after its children; ``without`` are left out with all inside."""
    found: list[nn.Module] = []
    seen = set(without)

    def visit(part: nn.Module) -> None:
        if part not in seen:
            seen.add(part)
            for child in part._modules.values():
                if child is not None:
                    visit(child)
            found.append(part)

    visit(module)
    return found


def own_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The parameters and buffers that ``module`` holds itself, each with the table it stands in and its name there."""
    for table in (module._parameters, module._buffers):
        for name, tensor in list(table.items()):
            if tensor is not None:
                yield table, name, tensor


def reset_method(module: nn.Module) -> Callable[[], object] | None:
    """The method that initialises what the module holds itself, if it has one."""
    # torch's own attention module spells it with an underscore.
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def optimizer_to_device(optimizer: Optimizer, device: Device) -> None:
    """Move the optimizer's state to ``device``, except ``step``, which optimizers keep where they count it."""
    for parameter, state in optimizer.state.items():
        if isinstance(state, dict):
            optimizer.state[parameter] = {k: v if k == "step" else _moved(v, device) for k, v in state.items()}
        else:
            optimizer.state[parameter] = _moved(state, device)


def _moved(value: Any, device: Device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, once for each place it stands in, in no particular order.

    ``parameters()`` builds names and remembers what it has seen, which costs several times as much.
    """
    pending, seen = [module], set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        for held in (part._parameters, part._buffers):
            for tensor in held.values():
                if tensor is not None:
                    yield tensor
        pending.extend(child for child in part._modules.values() if child is not None)


def move_in_place(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)``, unless all of it is there: looking is cheaper than going through every tensor's ``to``."""
    if any(tensor.device != device for tensor in tensors_of(module)):
        module.to(device)
