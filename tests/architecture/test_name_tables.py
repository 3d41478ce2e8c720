import importlib
import pkgutil

import pytest

import fabric_core
from fabric_core.registry.known import CLASSES

TABLES = [
    name
    for _, name, _ in pkgutil.walk_packages(fabric_core.__path__, "fabric_core.")
    if hasattr(importlib.import_module(name), "_TABLE")
]


@pytest.mark.parametrize("module", TABLES)
def test_every_listed_name_loads(module):
    table = importlib.import_module(module)
    assert all(getattr(table, name) is not None for name in table.__all__)
    assert dir(table) == sorted(table.__all__)


@pytest.mark.parametrize("name", ["Nothing", "_private", "__wrapped__"])
def test_a_name_that_is_not_listed_is_refused(name):
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(importlib.import_module("fabric_core.strategies"), name)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_another_distribution_says_what_to_install(name):
    dist, value = CLASSES[name]
    if importlib.util.find_spec(value.partition(".")[0]):
        pytest.skip(f"{dist} is installed")
    with pytest.raises(ImportError, match=f"pip install {dist}"):
        getattr(importlib.import_module("fabric_core.plugins"), name)
