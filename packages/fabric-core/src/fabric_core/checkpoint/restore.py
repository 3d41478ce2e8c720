"""Putting a checkpoint back into live objects, without a second copy of it in memory.

All that can be known to be wrong is found before anything is written. Then the file is read into the memory of the
parameters and optimizer states themselves, and each object's own ``load_state_dict`` runs on tensors that are its own
already: it has nothing to copy, but its checks and hooks run as ever. Whatever has no place yet, is loaded by custom
code, or overlaps is read to new memory and loaded as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.plan import Plan, plan_module, plan_optimizer
from fabric_core.checkpoint.state import check_keys, is_stateful, module_state
from fabric_core.errors import CheckpointError, InvalidTypeError
from fabric_core.keywords import accepted

if TYPE_CHECKING:
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.types import Path

    ModuleLoader = Callable[[nn.Module, Mapping[str, Any], bool], None]


def load_module(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Put ``state_dict`` into the module."""
    module.load_state_dict(state_dict, strict=strict)


def restore(
    io: CheckpointIO,
    path: Path,
    state: Any = None,
    strict: bool = True,
    weights_only: bool | None = None,
    *,
    module_loader: ModuleLoader = load_module,
    module_state: Callable[[nn.Module], Mapping[str, Any]] = module_state,
) -> dict[str, Any]:
    """Bring ``state`` to what the checkpoint says; return what was not asked for, as tensors in memory.

    Args:
        io: reads the file. One with ``open_checkpoint``, a context manager giving an ``OpenCheckpoint``, saves memory.
        path: where the checkpoint is.
        state: objects by name; a single module or optimizer whose state is the whole file; ``None`` for all there is.
            Stateful objects take their state; other values are replaced in the dict.
        strict: the names, and the modules' keys, must agree. Otherwise what both have is loaded.
        weights_only: ``None`` means True: no code from the file is run.
        module_loader: puts a state dict into a module, for strategies that wrap modules.
        module_state: gives the module's live state dict, with the keys that ``module_loader`` takes.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        CheckpointKeyError: names or keys that differ; nothing was written.
        CheckpointError: the file is damaged, or does not fit the objects; in that case, nothing was written.
    """
    if state is not None and not isinstance(state, dict | nn.Module | Optimizer):
        raise InvalidTypeError(
            f"The state to load into must be a dict, a module or an optimizer, got {type(state).__name__}. "
            'For other objects: {"name": object}.'
        )
    if state is None or state == {}:
        return io.load_checkpoint(path, **accepted(io.load_checkpoint, {"weights_only": weights_only}))
    with _opened(io, path, weights_only) as source:
        loading = _Restoration(source, strict, module_loader, module_state)
        if not isinstance(state, dict):
            loading.put(state, source.content, loading.plan(state, source.content, "The file's content"))
            return {}
        return loading.run(state, path)


class _Restoration:
    """One restore: first a plan for each object, then the loading."""

    def __init__(
        self,
        source: OpenCheckpoint,
        strict: bool,
        module_loader: ModuleLoader,
        module_state: Callable[[nn.Module], Mapping[str, Any]],
    ) -> None:
        self.source, self.strict = source, strict
        self.load_module, self.module_state = module_loader, module_state

    def run(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Restore by name; return the rest."""
        content = self.source.content
        if not isinstance(content, dict):
            raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not a dict of named states.")
        check_keys(state, content, self.strict)
        found = [key for key in state if key in content]
        plans = {key: self.plan(state[key], content[key], f"state[{key!r}]") for key in found}
        rest = {key: value for key, value in content.items() if key not in state}
        for key in found:
            value = content.pop(key)
            if is_stateful(state[key]):
                self.put(state[key], value, plans.pop(key))
            else:
                self.source.own([value])  # a bare tensor is in no container, hence the list
                state[key] = value
        self.source.own(rest)
        return rest

    def plan(self, target: Any, saved: Any, name: str) -> Plan:
        """What goes straight to live memory. Raises if ``saved`` cannot be loaded."""
        if isinstance(target, nn.Module):
            return plan_module(self.source, target, saved, self.module_state(target), self.strict, name)
        if isinstance(target, Optimizer):
            return plan_optimizer(self.source, target, saved, name)
        return Plan()

    def put(self, target: Any, saved: Any, plan: Plan) -> None:
        """Load one object."""
        plan.carry_out(self.source)
        self.source.own(saved)
        if isinstance(target, nn.Module):
            self.load_module(target, saved, self.strict)
        else:
            target.load_state_dict(saved)


@contextmanager
def _opened(io: CheckpointIO, path: Path, weights_only: bool | None) -> Iterator[OpenCheckpoint]:
    """The checkpoint through ``open_checkpoint`` if that is as good as the implementation's ``load_checkpoint``."""
    if _can_open(type(io)):
        opened: AbstractContextManager[OpenCheckpoint] = io.open_checkpoint(path, weights_only)  # type: ignore[attr-defined]
        with opened as source:
            yield source
    else:
        yield OpenCheckpoint(io.load_checkpoint(path, **accepted(io.load_checkpoint, {"weights_only": weights_only})))


def _can_open(kind: type[CheckpointIO]) -> bool:
    """Whether ``open_checkpoint`` exists and no subclass has replaced ``load_checkpoint`` alone, say to decrypt."""
    for base in kind.__mro__:
        if "open_checkpoint" in vars(base):
            return True
        if "load_checkpoint" in vars(base):
            return False
    return False
