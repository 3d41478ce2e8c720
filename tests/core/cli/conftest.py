from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from plugin_site import PluginSite, site  # noqa: F401 - a fixture

Fabric = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def fabric(site: PluginSite) -> Fabric:  # noqa: F811
    """Runs the command line in a process of its own that sees the site's plugins."""

    def run(*words: str, python: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *python, "-m", "fabric_core", *words],
            env={**os.environ, "PYTHONPATH": str(site.path), **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


@pytest.fixture
def cpu_seconds(site: PluginSite) -> Callable[..., float]:  # noqa: F811
    """The least CPU time of several runs of the command line: the wall clock of a busy machine says little.

    The first run compiles what it imports, as an installer would have done.
    """
    variables = {"PYTHONPATH": str(site.path), "PYTHONPYCACHEPREFIX": str(site.path.parent / "bytecode")}
    if not hasattr(os, "wait4"):
        pytest.skip("needs the CPU time of a child process")

    def once(words: tuple[str, ...]) -> float:
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "fabric_core", *words],
            {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | variables,
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )
        _, status, usage = os.wait4(child, 0)
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    return lambda *words: min(once(words) for _ in range(7))
