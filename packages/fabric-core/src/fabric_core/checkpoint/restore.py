"""Putting a checkpoint back into live objects, without a second copy of it in memory.

All that can be known to be wrong is found before anything is written, on all ranks. Then the checkpoint is read into
the memory of the parameters and optimizer states themselves, of each rank's part of them where they are spread, and
each object's own ``load_state_dict`` runs on tensors that are its own already: it has nothing to copy, but its checks
and hooks run as ever. Whatever has no place yet, is loaded by custom code, or overlaps is read to new memory and loaded
as usual.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.opening import opened
from fabric_core.checkpoint.optimizer_plan import plan_optimizer
from fabric_core.checkpoint.plan import Plan, plan_module, plan_values
from fabric_core.checkpoint.portable import clean_name
from fabric_core.checkpoint.state import check_keys, is_stateful, module_state
from fabric_core.errors import CheckpointError, InvalidTypeError

if TYPE_CHECKING:
    from fabric_core.abc.checkpoint import CheckpointIO
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path


def load_module(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Put ``state_dict`` into the module."""
    module.load_state_dict(state_dict, strict=strict)


@dataclass(frozen=True)
class Access:
    """How a strategy reaches what it has set up.

    Attributes:
        load_module: puts a state dict into a module.
        module_state: gives the module's live state dict, with the keys that ``load_module`` takes.
        ranks: those who load together; ``None`` for a process on its own.
        sharded: ranks hold parts of the modules, so that none should need the whole checkpoint in memory.
    """

    load_module: Callable[[nn.Module, Mapping[str, Any], bool], None] = load_module
    module_state: Callable[[nn.Module], Mapping[str, Any]] = module_state
    ranks: Ranks | None = None
    sharded: bool = False


def restore(
    io: CheckpointIO,
    path: Path,
    state: Any = None,
    strict: bool = True,
    weights_only: bool | None = None,
    *,
    access: Access | None = None,
) -> dict[str, Any]:
    """Bring ``state`` to what the checkpoint says; return what was not asked for, as tensors in host memory.

    Args:
        io: reads files. One with ``open_checkpoint``, a context manager giving an ``OpenCheckpoint``, saves memory.
        path: a file, or the folder of a sharded checkpoint.
        state: objects by name; a single module or optimizer whose state is all there is; ``None`` for everything.
            Stateful objects take their state; other values are replaced in the dict.
        strict: the names, the modules' keys, and the optimizers' parameters must agree. Otherwise what both have is
            loaded.
        weights_only: ``None`` means True: no code from the checkpoint is run.
        access: how the strategy reaches its objects. All of its ranks must call.

    Returns:
        What was not asked for; of a sharded checkpoint only what is of no module and no optimizer. Of a folder that
        something else than Fabric wrote, no tensors: whether they are of a module is not recorded there.

    Raises:
        FileNotFoundError: nothing is at ``path``; on all ranks, as what else a rank finds wrong.
        CheckpointKeyError: names or keys that differ; nothing was written.
        CheckpointError: the checkpoint is damaged, or does not fit the objects; in that case, nothing was written.
    """
    if state is not None and not isinstance(state, dict | nn.Module | Optimizer):
        raise InvalidTypeError(
            f"The state to load into must be a dict, a module or an optimizer, got {type(state).__name__}. "
            'For other objects: {"name": object}.'
        )
    access = access or Access()
    failed = f"Nothing was loaded from {os.fspath(path)!r}"
    with ExitStack() as stack:

        def prepared() -> _Restoration:
            source = stack.enter_context(opened(io, path, weights_only, access.ranks, spare=access.sharded))
            loading = _Restoration(source, state, strict, access)
            loading.prepare(path)
            return loading

        return together(access.ranks, prepared, failed).run()


class _Restoration:
    """One restore: first a plan for each object, then the loading."""

    def __init__(self, source: OpenCheckpoint, state: Any, strict: bool, access: Access) -> None:
        self.source, self.state, self.strict, self.access = source, state, strict, access
        self.plans: dict[str, Plan] = {}

    def prepare(self, path: Path) -> None:
        """Plan. Raises whatever can be known to be wrong."""
        content, state = self.source.content, self.state
        if not isinstance(state, dict):
            if state is not None:
                self.plans[""] = self._plan(state, self._bare_state(path), "The checkpoint's content")
            return
        if not isinstance(content, dict):
            if not state:
                return
            raise CheckpointError(f"{os.fspath(path)!r} holds a {type(content).__name__}, not a dict of named states.")
        check_keys(state, content, self.strict)
        for key in state:
            if key in content:
                self.plans[key] = self._plan(state[key], content[key], f"state[{key!r}]")

    def run(self) -> dict[str, Any]:
        """Restore by name; return the rest."""
        source, state = self.source, self.state
        if state is None or state == {}:
            everything: dict[str, Any] = source.own([source.content])[0]
            return everything
        if not isinstance(state, dict):
            self._put(state, self.plans.pop(""))
            return {}
        for key in list(self.plans):
            plan = self.plans.pop(key)
            if isinstance(source.content, dict):
                source.content[key] = None  # what was loaded is not needed any more
            if isinstance(state[key], nn.Module | Optimizer):
                self._put(state[key], plan)
                continue
            plan.carry_out(source)
            value = source.own(plan.state)[0]
            if is_stateful(state[key]):
                state[key].load_state_dict(value)
            else:
                state[key] = value
        rest: dict[str, Any] = source.own(source.rest(state))
        return rest

    def _plan(self, target: Any, saved: Any, name: str) -> Plan:
        """What to load, and what of it goes straight to live memory. Raises if ``saved`` cannot be loaded."""
        if isinstance(target, nn.Module):
            live = self.access.module_state(target)
            return plan_module(self.source, target, self.source.values(saved), live, self.strict, name)
        if isinstance(target, Optimizer):
            objects = self.state if isinstance(self.state, dict) else {}
            modules = {key: value for key, value in objects.items() if isinstance(value, nn.Module)}
            return plan_optimizer(self.source, target, saved, modules, self.strict, name)
        if not self.access.sharded:
            return Plan([saved])
        return plan_values(self.source, target.state_dict() if is_stateful(target) else target, saved)

    def _put(self, target: Any, plan: Plan) -> None:
        """Load a module or an optimizer."""
        plan.carry_out(self.source)
        state = self.source.own(plan.state)
        if not isinstance(target, nn.Module):
            target.load_state_dict(state)
        elif plan.implicit:
            from torch.distributed.tensor.experimental import implicit_replication

            with implicit_replication():  # custom code gets whole tensors, and copies them into sharded ones
                self.access.load_module(target, state, self.strict)
        else:
            self.access.load_module(target, state, self.strict)

    def _bare_state(self, path: Path) -> Any:
        """The state of the one object that the checkpoint is for; in a folder it may have a name."""
        content, target = self.source.content, self.state
        if not self.source.is_folder:
            return content
        others = self.source.rest(())
        content = {key: value for key, value in content.items() if key not in others} or content
        known = self.access.module_state(target) if isinstance(target, nn.Module) else ("param_groups",)
        if any(clean_name(str(key)) in known for key in content):
            return content
        for_optimizer = isinstance(target, Optimizer)
        states = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        matching = [key for key, value in states.items() if ("param_groups" in value) == for_optimizer]
        if len(matching) == 1:
            return states[matching[0]]
        raise CheckpointError(
            f"{os.fspath(path)!r} holds {', '.join(map(repr, content)) or 'nothing'}, and which of it is meant for "
            f"{type(target).__name__} cannot be told. Name it: fabric.load(path, {{name: object}})."
        )
