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
