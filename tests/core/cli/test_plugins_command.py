"""``fabric plugins`` tells what is installed without importing any of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from plugin_site import PluginSite

Fabric = Callable[..., Any]


def listed(fabric: Fabric, *words: str, **variables: str) -> dict[str, dict[str, Any]]:
    done = fabric("plugins", *words, "--json", **variables)
    assert done.returncode == 0, done.stderr
    return {ref["qualified"]: ref for ref in json.loads(done.stdout)}


def test_the_list_holds_core_and_what_is_installed(fabric: Fabric, site: PluginSite) -> None:
    site.strategy("fabric-foo", "my-plugin", version="1.2")
    refs = listed(fabric, "list")
    assert refs["fabric-core::cpu"]["kind"] == "accelerator"
    assert refs["fabric-foo::my-plugin"]["version"] == "1.2"
    assert "fabric-core::cpu" not in listed(fabric, "list", "--kind", "strategy")


def test_every_status_is_shown_with_its_reason(fabric: Fabric, site: PluginSite) -> None:
    site.strategy("fabric-a", "same")
    site.strategy("fabric-b", "same")
    site.strategy("fabric-c", "ddp")
    site.strategy("fabric-d", "late", requires=["fabric-core>=99"])
    site.strategy("fabric-e", "out")
    expected = {
        "fabric-a::same": ("ambiguous", "fabric-b claims the name too"),
        "fabric-c::ddp": ("shadowed", "fabric-core provides the name itself"),
        "fabric-d::late": ("incompatible", "it needs fabric-core>=99, this is"),
        "fabric-e::out": ("blocked", "FABRIC_PLUGINS_BLOCK lists fabric-e"),
    }
    refs = listed(fabric, "list", FABRIC_PLUGINS_BLOCK="fabric-e")
    table = fabric("plugins", "list", FABRIC_PLUGINS_BLOCK="fabric-e").stdout
    for name, (status, reason) in expected.items():
        assert refs[name]["status"] == status
        assert refs[name]["reason"].startswith(reason)
        assert f"{status}: {reason}" in table


def test_show_tells_all_about_one_name(fabric: Fabric, site: PluginSite) -> None:
    site.dist("fabric-foo", {"fabric.strategies": {"foo": "foo:F", "bar": "foo:F"}, "fabric.loggers": {"foo": "foo:L"}})
    text = fabric("plugins", "show", "FOO").stdout
    for line in ("kind:    strategy", "aliases: bar", "target:  foo:F", "kind:    logger", "from:    fabric-foo 1.0"):
        assert line in text.splitlines()
    assert list(listed(fabric, "show", "foo", "--kind", "logger")) == ["fabric-foo::foo"]
    assert list(listed(fabric, "show", "Fabric_Foo::bar")) == ["fabric-foo::foo"]


def test_show_of_an_unknown_name_says_who_has_it_and_exits_with_2(fabric: Fabric) -> None:
    done = fabric("plugins", "show", "ddq")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: plugin='ddq' is not known. Did you mean \"ddp\"?")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["plugins", "list"], ["plugins", "show", "broken"], ["--help"], ["--version"]])
def test_neither_torch_nor_a_plugin_is_imported(fabric: Fabric, site: PluginSite, words: list[str]) -> None:
    site.module("fabric_broken", "raise SystemExit('imported')")
    groups = ("fabric.strategies", "fabric.hooks", "fabric.cli")
    site.dist("fabric-broken", {group: {"broken": "fabric_broken:X"} for group in groups})
    done = fabric(*words, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "fabric_core.registry.registry" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "fabric_broken", "pluggy")}
