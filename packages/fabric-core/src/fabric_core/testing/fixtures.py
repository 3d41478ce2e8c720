"""Fixtures for pytest: name this module in ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fabric_core.registry import get_registry
from fabric_core.testing.fake import FakeAccelerator, FakePrecision, FakeStrategy
from fabric_core.testing.isolation import preserved
from fabric_core.testing.pool import WorkerPool


@pytest.fixture
def isolated() -> Iterator[None]:
    """Environment, rank, random states and torch's globals are put back after the test."""
    with preserved():
        yield


@pytest.fixture
def fake_backend() -> Iterator[None]:
    """Accelerator, strategy and precision named ``fake``, registered for the length of the test."""
    registry = get_registry()
    with ExitStack() as undo:
        undo.callback(registry.register("accelerator", "fake", FakeAccelerator))
        undo.callback(registry.register("strategy", "fake", FakeStrategy))
        undo.callback(registry.register("precision", "fake", FakePrecision))
        yield


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerPool]]:
    """``workers(n)`` is a pool of n gloo processes; the same one for the whole session."""
    pools: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        return pools.setdefault(world_size, WorkerPool(world_size))

    yield pool
    for started in pools.values():
        started.stop()
