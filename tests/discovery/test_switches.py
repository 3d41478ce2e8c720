"""The environment decides which plugins take part, before anything is imported."""

from __future__ import annotations

import sys

import pytest

from fabric_core.errors import InvalidArgumentError, PluginBlockedError, UnknownPluginError
from fabric_core.registry import Registry
from plugin_site import PluginSite


def status(registry: Registry, name: str) -> str:
    return next(ref.status for ref in registry.refs("strategy") if name in ref.names)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FABRIC_PLUGINS", ""), ("FABRIC_PLUGINS", "other"), ("FABRIC_PLUGINS_BLOCK", "other, Fabric_Foo")],
)
def test_a_plugin_that_is_kept_out_is_listed_and_refused(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    module = site.strategy("fabric-foo", "foo")
    ref = registry.find("strategy", "foo")
    monkeypatch.setenv(variable, value)
    assert status(registry, "foo") == "blocked"
    assert "foo" not in registry.names("strategy")
    for name in ("foo", "fabric-foo::foo"):
        with pytest.raises(PluginBlockedError, match=f"fabric-foo 1.0 is installed but kept out: {variable} "):
            registry.find("strategy", name)
    assert ref.status == "ok"
    assert module not in sys.modules


def test_the_allow_list_lets_its_distributions_in(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.strategy("fabric-foo", "foo")
    monkeypatch.setenv("FABRIC_PLUGINS", "fabric.foo")
    assert registry.find("strategy", "foo").status == "ok"


def test_core_is_never_kept_out(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRIC_PLUGINS", "")
    monkeypatch.setenv("FABRIC_PLUGINS_BLOCK", "fabric-core")
    assert registry.find("strategy", "ddp").status == "ok"


def test_without_autoload_nothing_is_scanned_and_core_works(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.strategy("fabric-foo", "foo")
    monkeypatch.setenv("FABRIC_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert "ddp" in registry.names("strategy")
    with pytest.raises(UnknownPluginError, match="FABRIC_DISABLE_PLUGIN_AUTOLOAD is set"):
        registry.find("strategy", "foo")
    with pytest.raises(PluginBlockedError, match="FABRIC_DISABLE_PLUGIN_AUTOLOAD is set"):
        registry.find("strategy", "fabric-foo::foo")
    assert not registry.has_hook("fabric_on_init")
    assert registry._discovery.scans == 0


def test_keeping_one_of_two_out_settles_a_contest(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.strategy("fabric-foo", "same")
    site.strategy("fabric-bar", "same")
    monkeypatch.setenv("FABRIC_PLUGINS_BLOCK", "fabric-foo")
    assert registry.find("strategy", "same").dist == "fabric-bar"


@pytest.mark.parametrize("name", ["same", "ddp", "acme"])
def test_a_preference_settles_a_contest_even_with_core(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    site.strategy("fabric-foo", name)
    site.strategy("fabric-bar", name)
    monkeypatch.setenv("FABRIC_PLUGINS_PREFER", f"strategy.{name.upper()}=fabric-foo, logger.x=fabric-y")
    assert registry.find("strategy", name).dist == "fabric-foo"
    others = [ref for ref in registry.refs("strategy") if name in ref.names and ref.dist != "fabric-foo"]
    assert {ref.status for ref in others} == {"shadowed"}


def test_a_preference_for_something_absent_is_an_error_when_used(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FABRIC_PLUGINS_PREFER", "strategy.ddp=fabric-foo")
    assert registry.find("accelerator", "cpu")
    with pytest.raises(UnknownPluginError, match="FABRIC_PLUGINS_PREFER gives strategy 'ddp' to fabric-foo, which is"):
        registry.find("strategy", "ddp")


@pytest.mark.parametrize("value", ["x", "strategy.x", "x=fabric-foo", "strategies.x=fabric-foo"])
def test_a_malformed_preference_is_an_error(registry: Registry, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FABRIC_PLUGINS_PREFER", value)
    with pytest.raises(InvalidArgumentError, match=r"write kind\.name=distribution|no kind of plugin"):
        registry.find("strategy", "ddp")


def test_the_trace_tells_what_is_read_and_imported(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.strategy("fabric-foo", "foo")
    monkeypatch.setenv("FABRIC_PLUGINS_TRACE", "1")
    registry.resolve("strategy", "foo")
    told = capsys.readouterr().err
    assert "fabric plugins: scan: " in told
    assert "imported fabric_foo:Made in " in told
