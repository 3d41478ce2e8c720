"""Which plugin a name means."""

from __future__ import annotations

import pickle
import sys

import pytest

from fabric_core.errors import (
    AmbiguousPluginError,
    InvalidArgumentError,
    InvalidTypeError,
    PluginLoadError,
    UnknownPluginError,
)
from fabric_core.registry import Registry
from fabric_core.registry.ref import GROUPS
from plugin_site import PluginSite


@pytest.mark.parametrize("kind", GROUPS)
def test_every_kind_is_found_by_its_group(registry: Registry, site: PluginSite, kind: str) -> None:
    site.module("foo_plugin", "class Made: ...")
    site.dist("fabric-foo", {GROUPS[kind]: {"foo": "foo_plugin:Made"}})
    assert registry.resolve(kind, "foo").__name__ == "Made"


@pytest.mark.parametrize("spelling", ["my-plugin", "my_plugin", "My_Plugin", "MY-PLUGIN"])
def test_case_and_dashes_do_not_matter(registry: Registry, site: PluginSite, spelling: str) -> None:
    site.strategy("fabric-foo", "My-plugin")
    assert registry.find("strategy", spelling).name == "My-plugin"


def test_a_name_may_hold_a_dot(registry: Registry, site: PluginSite) -> None:
    site.dist("fabric-foo", {"fabric.precision": {"foo.bf16-mixed": "foo:P"}})
    assert registry.find("precision", "foo.bf16_mixed").value == "foo:P"


def test_an_import_string_needs_no_metadata(registry: Registry) -> None:
    assert registry.resolve("logger", "collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize("text", ["a b:C", "mod:", ":C", "mod:C()", "C:\\x"])
def test_a_malformed_import_string_is_refused(registry: Registry, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="neither an import string"):
        registry.find("strategy", text)


def test_a_class_is_taken_as_it_is(registry: Registry) -> None:
    assert registry.resolve("strategy", dict) is dict
    assert registry.create("strategy", dict) == {}


def test_anything_else_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidTypeError, match="strategy=3 is not a name"):
        registry.find("strategy", 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="no kind of plugin: use one of accelerator, strategy"):
        registry.find("strategies", "ddp")


def test_two_names_of_one_target_are_aliases(registry: Registry, site: PluginSite) -> None:
    site.dist("fabric-foo", {"fabric.strategies": {"foo": "foo:F", "bar": "foo:F", "foo_fast": "foo:F.fast"}})
    by_name = {ref.name: ref.aliases for ref in registry.refs("strategy") if ref.dist == "fabric-foo"}
    assert by_name == {"foo": ("bar",), "foo_fast": ()}
    assert {"foo", "bar", "foo_fast"} <= set(registry.names("strategy"))


def test_exactly_one_module_is_imported_and_once(registry: Registry, site: PluginSite) -> None:
    one, other = site.strategy("fabric-foo", "foo"), site.strategy("fabric-bar", "bar")
    assert registry.resolve("strategy", "foo") is registry.resolve("strategy", "foo")
    assert one in sys.modules
    assert other not in sys.modules


def test_a_reference_survives_pickling_and_resolves(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    ref = pickle.loads(pickle.dumps(registry.find("strategy", "foo")))
    assert ref == registry.find("strategy", "foo")
    assert registry.resolve("strategy", ref).origin == "fabric-foo"  # type: ignore[attr-defined]


def test_two_claims_hurt_only_who_selects_the_name(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "same", version="1.2")
    site.strategy("fabric-bar", "same")
    site.strategy("fabric-baz", "baz")
    assert registry.resolve("strategy", "baz")
    with pytest.raises(AmbiguousPluginError) as refused:
        registry.find("strategy", "same")
    for part in ("fabric-foo 1.2", "fabric-bar 1.0", 'strategy="fabric-foo::same"', 'strategy="fabric-bar::same"'):
        assert part in str(refused.value)


def test_the_qualified_spelling_settles_a_contest(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "same")
    site.strategy("fabric-bar", "same")
    assert registry.find("strategy", "Fabric_Foo::same").dist == "fabric-foo"
    assert registry.find("strategy", "fabric-bar::SAME").dist == "fabric-bar"


def test_the_qualified_spelling_reaches_core_too(registry: Registry) -> None:
    registry.register("strategy", "ddp", dict, override=True)
    ref = registry.find("strategy", "fabric-core::ddp")
    assert ref.qualified == "fabric-core::ddp"
    assert ref.value.endswith(":DDPStrategy")


def test_one_distribution_that_claims_a_name_twice_is_told_apart_by_import_string(
    registry: Registry, site: PluginSite
) -> None:
    site.dist("fabric-foo", {"fabric.strategies": {"my-x": "foo:A", "my_x": "foo:B"}})
    with pytest.raises(AmbiguousPluginError, match=r"declared twice by fabric-foo 1\.0, for foo:A and foo:B"):
        registry.find("strategy", "my-x")


def test_a_name_of_core_is_never_taken_over(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "DDP")
    assert registry.find("strategy", "ddp").dist == "fabric-core"
    listed = next(ref for ref in registry.refs("strategy") if ref.dist == "fabric-foo")
    assert (listed.status, listed.reason) == ("shadowed", "fabric-core provides the name itself")
    assert registry.resolve("strategy", "fabric-foo::ddp").origin == "fabric-foo"  # type: ignore[attr-defined]


def test_a_reserved_name_is_not_taken_while_its_owner_is_absent(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "acme")
    with pytest.raises(UnknownPluginError) as refused:
        registry.find("strategy", "acme")
    assert "pip install fabric-acme" in str(refused.value)
    assert 'fabric-foo 1.0 claims the name too: pass strategy="fabric-foo::acme"' in str(refused.value)


def test_a_mere_beginning_is_its_owners_first_and_anybodys_then(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "acme_fast")
    assert registry.find("strategy", "acme_fast").dist == "fabric-foo"
    site.strategy("fabric-acme", "acme_fast")
    registry.refresh()
    assert registry.find("strategy", "acme_fast").dist == "fabric-acme"


def test_an_import_that_fails_names_the_plugin_and_chains_the_error(registry: Registry, site: PluginSite) -> None:
    site.module("foo_plugin", "import no_such_backend")
    site.dist("fabric-foo", {"fabric.strategies": {"foo": "foo_plugin:Made"}})
    with pytest.raises(PluginLoadError, match=r"strategy 'foo' of fabric-foo 1.0 .*No module named 'no_such_back") as e:
        registry.resolve("strategy", "foo")
    assert isinstance(e.value.__cause__, ModuleNotFoundError)
    assert isinstance(e.value, ImportError)


@pytest.mark.parametrize("value", ["foo_plugin:absent", "foo_plugin:number", "foo_plugin"])
def test_a_target_that_is_absent_or_cannot_be_called_is_refused(
    registry: Registry, site: PluginSite, value: str
) -> None:
    site.module("foo_plugin", "number = 3")
    site.dist("fabric-foo", {"fabric.strategies": {"foo": value}})
    with pytest.raises(PluginLoadError, match="strategy 'foo' of fabric-foo"):
        registry.resolve("strategy", "foo")


def test_a_reference_of_another_kind_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArgumentError, match=r"accelerator 'cpu' of fabric-core .* is no strategy"):
        registry.resolve("strategy", registry.find("accelerator", "cpu"))
