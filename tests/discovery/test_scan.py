"""Installed distributions are read late, once, and one that is damaged hurts no other."""

from __future__ import annotations

import sys

import pytest

from fabric_core.registry import Registry
from plugin_site import PluginSite


def scans(registry: Registry) -> int:
    return registry._discovery.scans


def test_a_name_of_core_needs_no_scan(registry: Registry) -> None:
    assert registry.find("strategy", "ddp").dist == "fabric-core"
    assert scans(registry) == 0


def test_a_first_party_name_reads_one_distribution(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-acme", "acme")
    assert registry.find("strategy", "acme").version == "1.0"
    assert scans(registry) == 0


def test_a_qualified_name_reads_one_distribution(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    assert registry.find("strategy", "fabric-foo::foo").name == "foo"
    assert scans(registry) == 0


def test_all_other_questions_share_one_scan(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    for _ in range(3):
        registry.find("strategy", "foo")
        registry.refs()
        registry.diagnose()
        registry.has_hook("fabric_on_init")
    assert scans(registry) == 1


def test_finding_and_listing_import_no_plugin(registry: Registry, site: PluginSite) -> None:
    module = site.strategy("fabric-foo", "foo")
    assert "foo" in registry.names("strategy")
    registry.find("strategy", "foo")
    registry.diagnose()
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("file", "content"), [("entry_points.txt", b"[fabric.strategies]\nno equals sign\n"), ("METADATA", b"\xff\xfe")]
)
def test_damaged_metadata_is_reported_and_the_rest_still_works(
    registry: Registry, site: PluginSite, file: str, content: bytes
) -> None:
    (site.dist("fabric-broken", {"fabric.strategies": {"broken": "broken:B"}}) / file).write_bytes(content)
    site.strategy("fabric-foo", "foo")
    assert registry.find("strategy", "foo").dist == "fabric-foo"
    assert any("broken" in finding.subject for finding in registry.diagnose() if finding.severity == "error")


def test_a_stale_copy_further_down_the_path_adds_nothing(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.strategy("fabric-foo", "foo", version="2.0")
    stale = PluginSite(site.path.parent / "stale")
    stale.dist("fabric-foo", {"fabric.strategies": {"gone": "gone:G", "foo": "gone:G"}}, version="1.0")
    monkeypatch.setattr(sys, "path", [*sys.path, str(stale.path)])
    assert registry.find("strategy", "foo").version == "2.0"
    assert "gone" not in registry.names("strategy")


def test_what_was_installed_meanwhile_is_found_before_a_name_is_given_up(registry: Registry, site: PluginSite) -> None:
    assert "late" not in registry.names("strategy")
    site.strategy("fabric-late", "late")
    assert registry.find("strategy", "late").dist == "fabric-late"


def test_refresh_shows_what_was_installed_meanwhile(registry: Registry, site: PluginSite) -> None:
    registry.names("strategy")
    site.strategy("fabric-late", "late")
    registry.refresh()
    assert "late" in registry.names("strategy")


def test_groups_of_other_projects_are_left_alone(registry: Registry, site: PluginSite) -> None:
    site.dist("other", {"lightning.fabric.strategies": {"x": "x:X"}, "fabricated": {"y": "y:Y"}})
    assert not {"x", "y"} & set(registry.names("strategy"))
