"""What proves a plugin: a fake backend, isolation for tests, and workers that are real processes.

In a ``conftest.py``::

    pytest_plugins = ["fabric_core.testing.fixtures"]

gives the fixtures ``isolated`` (environment, registry and torch's globals as they were before the test),
``fake_backend`` (accelerator, strategy and precision named ``fake``) and ``workers`` (a pool of gloo processes).
"""

from __future__ import annotations

from fabric_core.lazy import name_table

_TABLE = {
    "FakeAccelerator": "fabric_core.testing.fake:FakeAccelerator",
    "FakePrecision": "fabric_core.testing.fake:FakePrecision",
    "FakeStrategy": "fabric_core.testing.fake:FakeStrategy",
    "WorkerPool": "fabric_core.testing.pool:WorkerPool",
    "preserved": "fabric_core.testing.isolation:preserved",
}
__getattr__, __dir__ = name_table(__name__, _TABLE)
__all__ = sorted(_TABLE)
