"""Ranks that use different plugins find out."""

from __future__ import annotations

import pytest

from fabric_core.errors import IncompatiblePluginError
from fabric_core.registry import Registry
from fabric_core.registry.fingerprint import check_same
from plugin_site import PluginSite


def test_equal_installations_have_equal_fingerprints(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    refs = [registry.find("strategy", name) for name in ("foo", "ddp", "collections:OrderedDict")]
    prints = registry.fingerprint(refs)
    assert prints == Registry().fingerprint(refs)
    check_same(1, prints, prints)
    assert hash(prints)


def test_another_version_on_another_rank_is_named(registry: Registry, site: PluginSite) -> None:
    folder = site.dist("fabric-foo", {"fabric.strategies": {"foo": "foo:F"}}, version="1.0")
    refs = [registry.find("strategy", "foo")]
    first = registry.fingerprint(refs)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fabric-foo\nVersion: 1.1\n")
    registry.refresh()
    with pytest.raises(IncompatiblePluginError, match=r"rank 2 has .*fabric-foo 1\.1.*, rank 0 has .*fabric-foo 1\.0"):
        check_same(2, registry.fingerprint(refs), first)


def test_a_plugin_absent_on_one_rank_is_named(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    refs = [registry.find("strategy", "foo")]
    with pytest.raises(IncompatiblePluginError, match="rank 1 has strategy 'foo' not installed"):
        check_same(1, Registry(entry_points=[]).fingerprint(refs), registry.fingerprint(refs))
