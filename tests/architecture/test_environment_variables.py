import importlib
from pathlib import Path

import pytest

from fabric_core.settings import Setting

from .source import PACKAGES

PAGE = Path(__file__).parents[2] / "docs" / "environment-variables.md"


def rows():
    return {line.split("|")[1].strip(" `"): line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


def declared():
    """The settings of all packages by variable name; several packages may read one."""
    modules = [
        importlib.import_module(f"{name}.settings")
        for name, at in PACKAGES.items()
        if at.joinpath("settings.py").exists()
    ]
    return [one for module in modules for one in vars(module).values() if isinstance(one, Setting)]


def row(setting):
    default = f"`{setting.default}`" if setting.default is not None else ""
    return f"| `{setting.name}` | {setting.doc} | {default} |"


@pytest.mark.parametrize("setting", declared(), ids=lambda setting: setting.name)
def test_a_variable_is_documented_as_declared(setting):
    assert rows()[setting.name] == row(setting)


def test_no_other_variable_is_documented():
    assert set(rows()) == {setting.name for setting in declared()}
