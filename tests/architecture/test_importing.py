"""Importing costs nothing and changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHANGES = """
import logging, os, sys, warnings
{prepare}
def look():
    torch = sys.modules.get("torch")
    handlers = [list(logger.handlers) for logger in map(logging.getLogger, ("", "fabric_core", "lightning", "torch"))]
    attributes = {{name: id(value) for name, value in vars(torch).items()}} if torch else {{}}
    compiled = id(torch.compile) if torch else None
    return dict(os.environ), list(warnings.filters), handlers, attributes, compiled, id(warnings.formatwarning)
before = look()
{act}
after = look()
for old, new in zip(before, after):
    if isinstance(old, dict):  # torch loads some of its own submodules late
        new = {{name: value for name, value in new.items() if name in old or name.isupper()}}
    assert old == new, (old, new)
"""


def python(code: str) -> set[str]:
    """Run the code in a fresh interpreter; the names of the modules it ended with."""
    code += "\nimport sys; print('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("modules:")[2].split())


def test_importing_the_package_imports_nothing_but_python() -> None:
    added = python("import fabric_core") - python("import importlib, typing, __future__")
    assert added <= {"fabric_core"}


@pytest.mark.parametrize(
    "module", ["abc", "abc.hooks", "registry", "registry.hooks", "cli.main", "cli.plugins", "settings"]
)
def test_finding_plugins_needs_no_torch(module: str) -> None:
    assert "torch" not in python(f"import fabric_core.{module}")


def test_metadata_is_not_read_before_it_is_needed() -> None:
    code = "from fabric_core.registry import get_registry\nget_registry().find('strategy', 'ddp')"
    assert not {"importlib.metadata", "importlib_metadata", "pluggy", "packaging"} & python(code)


def test_importing_changes_nothing() -> None:
    python(CHANGES.format(prepare="", act="import fabric_core"))
    python(CHANGES.format(prepare="import torch", act="from fabric_core import *"))


def test_the_facade_imports_no_strategy_it_does_not_use() -> None:
    imported = python("from fabric_core import Fabric\nFabric(accelerator='cpu', devices=1)")
    assert not {"fabric_core.strategies.ddp", "fabric_core.strategies.fsdp", "fabric_core.testing"} & imported
