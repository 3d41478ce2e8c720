"""Remembering how loaders and batch samplers were constructed, so that they can be constructed again with a sampler.

A loader keeps neither all of its constructor's arguments nor, in a subclass, any. While ``capture_constructors()`` is
active, each object notes them in its own ``__dict__``, together with the names of attributes changed since.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

_KEY = "_fabric_construction"
_MARK = "_fabric_captures"
_ABSENT = object()
_BASES: tuple[type, ...] = (DataLoader, BatchSampler)

# What loaders set while they are iterated; it belongs to an object, not to its configuration.
RUNTIME_ATTRIBUTES = frozenset({_KEY, "_iterator", "_IterableDataset_len_called"})


@dataclass
class Construction:
    """How one object was constructed, and the names of the attributes set or deleted since, in order."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    running: bool = True
    changed: dict[str, None] = field(default_factory=dict)


def construction_of(obj: object) -> Construction | None:
    """What was noted about ``obj``, ``None`` if it was constructed while nothing was captured."""
    return getattr(obj, "__dict__", {}).get(_KEY)


@contextmanager
def capture_constructors() -> Iterator[None]:
    """Inside the ``with`` block, ``DataLoader``, ``BatchSampler`` and subclasses note how they are constructed.

    That holds for classes defined inside the block too, and in all threads. At the end of the outermost block, however
    it comes, the classes are exactly as before; objects keep their notes.
    """
    _patches.enter()
    try:
        yield
    finally:
        _patches.leave()


class _Patches:
    """The class attributes replaced for as long as at least one block is active."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._replaced: list[tuple[type, str, object]] = []

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                try:
                    self._install()
                except BaseException:
                    self.leave()
                    raise

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            while not self._depth and self._replaced:
                cls, name, original = self._replaced.pop()
                if original is _ABSENT:
                    delattr(cls, name)
                else:
                    setattr(cls, name, original)

    def watch_constructor(self, cls: type) -> None:
        # A class without its own __init__ may get one from a mixin that is no loader.
        init = cls.__init__  # type: ignore[misc]
        if not hasattr(init, _MARK):
            self._replace(cls, "__init__", _noting_arguments(init))

    def _install(self) -> None:
        for base in _BASES:
            for name in ("__setattr__", "__delattr__"):
                self._replace(base, name, _noting_change(base, name))
            self._replace(base, "__init_subclass__", classmethod(_watching_subclasses(base)))
            for cls in _with_subclasses(base):
                self.watch_constructor(cls)

    def _replace(self, cls: type, name: str, value: object) -> None:
        with self._lock:
            if self._depth:
                self._replaced.append((cls, name, vars(cls).get(name, _ABSENT)))
                setattr(cls, name, value)


_patches = _Patches()


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _watching_subclasses(base: type) -> Callable[..., None]:
    def init_subclass(cls: type, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type] # mypy sees no metaclass in `type`
        _patches.watch_constructor(cls)

    return init_subclass


def _noting_arguments(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        noted = construction_of(self)
        is_outermost = noted is None or not noted.running
        # If the class's constructor is not among those replaced, this call comes from it, with other arguments.
        if not is_outermost or not hasattr(type(self).__init__, _MARK):
            init(self, *args, **kwargs)
            return
        noted = Construction(args, kwargs)
        vars(self)[_KEY] = noted
        try:
            init(self, *args, **kwargs)
        finally:
            noted.running = False

    setattr(construct, _MARK, True)
    return construct


def _noting_change(base: type, method: str) -> Callable[..., None]:
    own = vars(base).get(method)

    def change_and_note(self: Any, name: str, *value: Any) -> None:
        if own is None:
            getattr(super(base, self), method)(name, *value)
        else:
            own(self, name, *value)
        noted = construction_of(self)
        if noted is not None and not noted.running and name not in RUNTIME_ATTRIBUTES:
            noted.changed.pop(name, None)  # the latest change comes last
            noted.changed[name] = None

    return change_and_note
