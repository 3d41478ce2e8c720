"""A name table and what type checkers are told of it must be the same."""

import ast
import importlib
from pathlib import Path

import pytest

TABLES = ["fabric_core.accelerators", "fabric_core.precision", "fabric_core.strategies"]


@pytest.mark.parametrize("name", TABLES)
def test_type_checkers_know_every_name_of_a_table(name):
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    told = {alias.asname: f"{node.module}:{alias.name}" for node in imports for alias in node.names if alias.asname}
    assert told == module._TABLE
