"""A plugin for another core is refused before its import, one for another contract level after it."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from fabric_core.errors import AmbiguousPluginError, IncompatiblePluginError
from fabric_core.registry import Registry
from fabric_core.registry.contract import CORE_VERSION
from plugin_site import PluginSite


def test_the_version_in_code_is_the_version_of_the_distribution() -> None:
    assert version("fabric-core") == CORE_VERSION


@pytest.mark.parametrize(
    "requirement", ["fabric-core>=99", "fabric_core <0.0.1", "Fabric.Core~=98.1", 'fabric-core>=99; python_version>"3"']
)
def test_a_plugin_for_another_core_is_refused_before_its_import(
    registry: Registry, site: PluginSite, requirement: str
) -> None:
    module = site.strategy("fabric-foo", "foo", requires=["torch", requirement])
    for name in ("foo", "fabric-foo::foo"):
        with pytest.raises(IncompatiblePluginError, match=f"it needs fabric-core.*, this is {CORE_VERSION}"):
            registry.find("strategy", name)
    assert module not in sys.modules
    assert "foo" not in registry.names("strategy")


@pytest.mark.parametrize(
    "requirement",
    ["fabric-core", "fabric-core>=0.0.1,<99", 'fabric-core>=99; extra=="x"', "fabric-core-extras>=99", "torch>=2"],
)
def test_a_plugin_for_this_core_is_used(registry: Registry, site: PluginSite, requirement: str) -> None:
    site.strategy("fabric-foo", "foo", requires=[requirement])
    assert registry.find("strategy", "foo").status == "ok"


def test_a_plugin_older_than_core_supports_is_refused(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-old", "old", version="1.9")
    with pytest.raises(IncompatiblePluginError, match=r"needs fabric-old>=2.0, this is 1.9"):
        registry.find("strategy", "old")


def test_an_incompatible_plugin_still_claims_its_name(registry: Registry, site: PluginSite) -> None:
    """An upgrade of core must not hand a name over to somebody else without a word."""
    site.strategy("fabric-foo", "same", requires=["fabric-core>=99"])
    site.strategy("fabric-bar", "same")
    with pytest.raises(AmbiguousPluginError):
        registry.find("strategy", "same")


LEVELS = """
    class Made:
        fabric_api = "99"

        @classmethod
        def preset(cls): return cls()

    def factory(): return Made()
    factory.fabric_api = "99"

    def silent(): return "made"
"""


@pytest.mark.parametrize("attribute", ["Made", "Made.preset", "factory"])
def test_another_contract_level_is_refused_after_the_import(
    registry: Registry, site: PluginSite, attribute: str
) -> None:
    site.module("foo_plugin", LEVELS)
    site.dist("fabric-foo", {"fabric.strategies": {"foo": f"foo_plugin:{attribute}"}})
    with pytest.raises(
        IncompatiblePluginError, match=r"fabric-foo 1\.0 is written for contract level 99, .* has level 1"
    ):
        registry.resolve("strategy", "foo")


def test_a_function_that_states_no_level_is_used(registry: Registry, site: PluginSite) -> None:
    site.module("foo_plugin", LEVELS)
    site.dist("fabric-foo", {"fabric.strategies": {"foo": "foo_plugin:silent"}})
    assert registry.create("strategy", "foo") == "made"
