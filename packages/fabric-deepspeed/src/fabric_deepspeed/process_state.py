"""What DeepSpeed keeps for the whole process, put back when the last strategy that uses it is torn down."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any, Final

import torch
import torch.distributed as dist

from fabric_deepspeed.backend import LOGGER

_RANGES: Final = "deepspeed.utils.nvtx"
_GROUPS: Final = "deepspeed.utils.groups"
_MODULES: Final = (
    "deepspeed.comm.comm",
    _GROUPS,
    _RANGES,
    "deepspeed.runtime.activation_checkpointing.checkpointing",
    "deepspeed.runtime.zero.parameter_offload",
)
_INIT: Final = "deepspeed.runtime.zero.partition_parameters"
_FIXED: Final = (FunctionType, ModuleType, type)
_CONTAINERS: Final = (dict, list, set)


class SharedState:
    """Counts who uses DeepSpeed in this process; the first to come takes a picture, the last to leave restores it.

    DeepSpeed's copy of the default process group is used again as long as that group is the same: each copy has threads
    that never end.
    """

    def __init__(self) -> None:
        self.users = 0
        self._restore: Callable[[], None] | None = None
        self._copies: list[tuple[Any, Any]] = []

    def enter(self, logging_level: int) -> None:
        """Take the picture if nobody else has, and set the level of DeepSpeed's log."""
        if self.users == 0:
            self._restore = _picture()
            groups: Any = importlib.import_module(_GROUPS)
            groups._WORLD_GROUP = next((copy for group, copy in self._copies if group is dist.group.WORLD), None)
        self.users += 1
        logger = logging.getLogger(LOGGER)
        logger.setLevel(logging_level)
        for handler in logger.handlers:
            handler.setLevel(logging_level)

    def leave(self) -> None:
        """Restore the picture if nobody else is left."""
        self.users -= 1
        if self.users == 0 and self._restore is not None:
            group, copy = dist.group.WORLD, getattr(importlib.import_module(_GROUPS), "_WORLD_GROUP", None)
            if copy is not None and all(copy is not known for _, known in self._copies):
                self._copies.append((group, copy))
            restore, self._restore = self._restore, None
            restore()


shared_state: Final = SharedState()


def _picture() -> Callable[[], None]:
    undo = [_globals_of(importlib.import_module(name)) for name in _MODULES]
    undo += [_init_counters(), _linear(), _log_levels()]

    def restore() -> None:
        for one in reversed(undo):
            one()

    return restore


def _globals_of(module: ModuleType) -> Callable[[], None]:
    """The variables of a module, containers with their content."""
    before = {name: (value, _content(value)) for name, value in vars(module).items() if _is_variable(name, value)}

    def restore() -> None:
        for name in [name for name, value in vars(module).items() if _is_variable(name, value) and name not in before]:
            delattr(module, name)
        for name, (value, content) in before.items():
            if content is not None:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)
            setattr(module, name, value)

    return restore


def _is_variable(name: str, value: Any) -> bool:
    return not name.startswith("__") and not isinstance(value, _FIXED)


def _content(value: Any) -> Any:
    return value.copy() if isinstance(value, _CONTAINERS) else None


def _init_counters() -> Callable[[], None]:
    """The class attributes in which ``zero.Init`` adds up what it has seen, over all models."""
    init = importlib.import_module(_INIT).Init
    before = {
        (cls, name): value
        for cls in init.__mro__[:-1]
        for name, value in vars(cls).items()
        if isinstance(value, (int, bool)) and not name.startswith("_")
    }

    def restore() -> None:
        for (cls, name), value in before.items():
            setattr(cls, name, value)

    return restore


def _linear() -> Callable[[], None]:
    """``torch.nn.functional.linear``, which stage 3 replaces and leaves replaced."""
    before = torch.nn.functional.linear

    def restore() -> None:
        torch.nn.functional.linear = before

    return restore


def _log_levels() -> Callable[[], None]:
    logger = logging.getLogger(LOGGER)
    level, levels = logger.level, [(handler, handler.level) for handler in logger.handlers]

    def restore() -> None:
        logger.setLevel(level)
        for handler, before in levels:
            handler.setLevel(before)

    return restore


def configure_activation_checkpointing(deepspeed: ModuleType, config: Mapping[str, Any]) -> None:
    """Tell ``deepspeed.checkpointing`` how to keep activations, if DeepSpeed's dictionary says anything about it."""
    section = config.get("activation_checkpointing")
    if section and any(section.values()):
        deepspeed.checkpointing.configure(None, deepspeed_config=dict(config))


def stop_profiler_ranges() -> None:
    """Have DeepSpeed name nothing for profilers until the end: the compiler would break its graphs there."""
    importlib.import_module(_RANGES).enable_nvtx = False  # type: ignore[attr-defined]
