"""Putting a checkpoint into a live engine: DeepSpeed's own of any stage and number of ranks, or another strategy's.

Everything is by the names of parameters. All that can be known to be wrong is found before anything is changed, on all
ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.checkpoint.lazy import OpenCheckpoint
from fabric_core.checkpoint.optimizer_plan import plan_optimizer
from fabric_core.checkpoint.plan import Plan, plan_module
from fabric_core.checkpoint.portable import clean_keys
from fabric_core.checkpoint.state import check_keys, is_stateful
from fabric_core.errors import CheckpointError
from fabric_deepspeed.checkpoint.live import flat_optimizer
from fabric_deepspeed.checkpoint.optimizer_state import Match, load_state, match_state
from fabric_deepspeed.checkpoint.saved import copied
from fabric_deepspeed.checkpoint.weights import check_weights, load_weights

if TYPE_CHECKING:
    from fabric_core.types import Path
    from fabric_deepspeed.checkpoint.named import NamedEngine
    from fabric_deepspeed.checkpoint.saved import SavedEngine


class EngineLoading:
    """One load.

    Args:
        source: the opened checkpoint.
        saved: the same, if DeepSpeed wrote it.
        named: what is to be loaded.
        state: the user's dict, in which values are replaced.
        strict: names and keys must agree.
        keeps_frozen: frozen parameters may be missing, because the strategy stores none.
    """

    def __init__(
        self,
        source: OpenCheckpoint,
        saved: SavedEngine | None,
        named: NamedEngine,
        state: dict[str, Any],
        strict: bool,
        keeps_frozen: bool,
    ) -> None:
        self._source, self._saved, self._named, self._state = source, saved, named, state
        self._strict, self._keeps_frozen = strict, keeps_frozen
        self._weights: Mapping[str, Any] = {}
        self._match: Match | Plan | None = None
        self._plans: dict[str, Plan] = {}

    def prepare(self, path: Path) -> None:
        """Find out what goes where. Raises whatever can be known to be wrong."""
        content, named = self._source.content, self._named
        if not isinstance(content, dict):
            raise CheckpointError(f"{os.fspath(path)!r} holds a {type(content).__name__}, not a dict of named states.")
        check_keys(self._state, [*content, *self._unreadable()], self._strict)
        if named.module in content:
            self.prepare_weights(content[named.module], f"state[{named.module!r}]")
        if named.optimizer is not None and named.optimizer in {*content, *self._unreadable()}:
            self.prepare_optimizer(content.get(named.optimizer), f"state[{named.optimizer!r}]")
        for key, value in named.others.items():
            if key in content:
                self._plans[key] = self._plan(value, content[key], f"state[{key!r}]")

    def prepare_weights(self, weights: Any, name: str) -> None:
        """The same for the module alone."""
        weights = clean_keys(self._source.values(weights))
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{name} is a {type(weights).__name__} in the checkpoint, not the state of a module.")
        frozen = [key for key, p in self._named.engine.module.named_parameters() if not p.requires_grad]
        check_weights(self._named.engine, weights, self._strict, frozen if self._keeps_frozen else (), name)
        self._weights = weights

    def prepare_optimizer(self, state: Any, name: str) -> None:
        """The same for the optimizer alone."""
        engine, saved = self._named.engine, self._saved
        flat = flat_optimizer(engine)
        if state is None and self._same_form():
            return  # only the optimizer itself can read that
        if state is None and saved is not None:
            raise CheckpointError(
                f"{name}: the optimizer's state in {saved.path!r} cannot be loaded here: {saved.why_no_optimizer}. "
                "Nothing was loaded. Load without the optimizer, to go on from the weights with a fresh one."
            )
        if flat is not None:
            self._match = match_state(flat, self._source.values(state), self._strict, name)
        elif engine.optimizer is engine.basic_optimizer:
            modules = {self._named.module or "model": engine.module}
            self._match = plan_optimizer(self._source, engine.optimizer, state, modules, self._strict, name)
        else:
            raise CheckpointError(
                f"{name}: this engine, at stage 0 in 16 bits, reads its optimizer's state from a checkpoint of the "
                "same kind of engine only. Nothing was loaded. Load without the optimizer, or use stage 1."
            )

    def run(self) -> dict[str, Any]:
        """Load; return the rest."""
        engine, read = self._named.engine, self._read
        if self._weights:
            load_weights(engine, self._weights, read)
        if isinstance(self._match, Match):
            flat = flat_optimizer(engine)
            assert flat is not None
            load_state(engine, flat, self._match, read)
        elif self._match is not None:
            self._match.carry_out(self._source)
            engine.optimizer.load_state_dict(self._source.own(self._match.state))
        elif self._named.optimizer is not None and self._same_form() and self._saved is not None:
            engine.optimizer.load_state_dict(copied(self._saved.raw_optimizer))
        if self._named.optimizer is not None and self._saved is not None:
            self._restore_progress(self._saved)
        for key, plan in self._plans.items():
            self._put(key, plan)
        rest: dict[str, Any] = self._source.own(self._source.rest(self._state))
        return rest

    def _read(self, value: Any) -> Any:
        """In memory of its own, that nothing here holds on to: one tensor after the other is enough."""
        if not isinstance(value, Tensor) or not self._source.is_window(value):
            return value
        whole = torch.empty(value.shape, dtype=value.dtype)
        self._source.read([(value, whole)])
        return whole

    def _unreadable(self) -> list[str]:
        """The optimizer's name, where the checkpoint has its state but not by the names of parameters."""
        saved, name = self._saved, self._named.optimizer
        return [name] if saved is not None and saved.optimizer is None and name is not None else []

    def _same_form(self) -> bool:
        """Whether the engine's optimizer is of the kind that has written the state, and no other reads."""
        raw, optimizer = (None if self._saved is None else self._saved.raw_optimizer), self._named.engine.optimizer
        if not isinstance(raw, Mapping) or optimizer is None or flat_optimizer(self._named.engine) is not None:
            return False
        return bool(raw.keys() == optimizer.state_dict().keys())

    def _restore_progress(self, saved: SavedEngine) -> None:
        """The engine's counters and the state of its loss scaler, which belong to its optimizer."""
        engine = self._named.engine
        for name, value in saved.counters.items():
            setattr(engine, name, value)
        live, scaler = getattr(engine.optimizer, "loss_scaler", None), saved.scaler
        if live is None or scaler is None or getattr(scaler, "dynamic", False) != getattr(live, "dynamic", False):
            return  # a scale that changes says nothing about one that does not
        vars(live).update({key: value for key, value in vars(scaler).items() if key in vars(live)})

    def _plan(self, target: Any, stored: Any, name: str) -> Plan:
        """What to load into something that is of no engine."""
        source = self._source
        if isinstance(target, nn.Module):
            return plan_module(source, target, source.values(stored), target.state_dict(), self._strict, name)
        if isinstance(target, Optimizer):
            others = {key: value for key, value in self._named.others.items() if isinstance(value, nn.Module)}
            return plan_optimizer(source, target, stored, others, self._strict, name)
        return Plan([source.values(stored)])

    def _put(self, key: str, plan: Plan) -> None:
        plan.carry_out(self._source)
        target, value = self._state[key], self._source.own(plan.state)
        if isinstance(target, nn.Module):
            target.load_state_dict(value, strict=self._strict)
        elif isinstance(target, Optimizer):
            target.load_state_dict(value)
        elif is_stateful(target):
            target.load_state_dict(value[0])
        else:
            self._state[key] = value[0]
