"""A name that nothing provides: the error says who would, what was meant, or what there is."""

from __future__ import annotations

import pytest

from fabric_core.errors import UnknownPluginError
from fabric_core.registry import Registry
from fabric_core.registry.known import Known, device_hint
from plugin_site import PluginSite


def refusal(registry: Registry, name: str, kind: str = "strategy") -> str:
    with pytest.raises(UnknownPluginError) as refused:
        registry.find(kind, name)
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, KeyError)
    return str(refused.value)


def test_a_first_party_name_says_what_to_install(registry: Registry) -> None:
    expected = 'strategy "acme" is provided by fabric-acme, which is not installed: pip install fabric-acme'
    assert refusal(registry, "acme") == expected
    assert refusal(registry, "acme_stage_7").endswith("pip install fabric-acme")


def test_a_first_party_name_that_the_installed_version_lacks_says_so(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-acme", "acme", version="0.3")
    message = refusal(registry, "acme_new")
    assert "belongs to fabric-acme, whose installed version 0.3 has no such name" in message
    assert 'Did you mean "acme"?' in message or "Installed: " in message


def test_a_typing_mistake_is_corrected(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "my-plugin")
    assert 'Did you mean "my-plugin"?' in refusal(registry, "my_plugn")
    assert 'Did you mean "ddp_spawn"?' in refusal(registry, "dpd-spawn")


def test_a_typing_mistake_in_a_name_not_installed_says_what_to_install(registry: Registry) -> None:
    assert 'Did you mean "acme" (pip install fabric-acme)?' in refusal(registry, "acm")


def test_otherwise_the_installed_names_are_listed(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "my-plugin")
    message = refusal(registry, "zzz")
    assert message.startswith("strategy='zzz' is not known. Installed: ")
    assert {"ddp", "my-plugin"} <= set(message.rstrip(".").partition("Installed: ")[2].split(", "))


def test_a_distribution_without_the_name_lists_what_it_has(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    assert refusal(registry, "fabric-foo::bar").endswith("fabric-foo has no strategy 'bar'. It provides: foo.")
    assert "fabric-none is not installed or provides no strategy" in refusal(registry, "fabric-none::bar")


def test_no_package_name_is_made_from_what_was_typed(registry: Registry) -> None:
    assert "pip install" not in refusal(registry, "evil-package")
    assert "pip install" not in refusal(registry, "fabric-evil::evil")


@pytest.mark.parametrize(
    ("kind", "name", "dist"),
    [
        ("strategy", "deepspeed", "fabric-deepspeed"),
        ("strategy", "DeepSpeed-Stage-3-Offload", "fabric-deepspeed"),
        ("strategy", "xla_fsdp", "fabric-xla"),
        ("strategy", "single_xla", "fabric-xla"),
        ("strategy", "dp", "fabric-cuda"),
        ("accelerator", "tpu", "fabric-xla"),
        ("accelerator", "cuda", "fabric-cuda"),
        ("precision", "transformer-engine-float16", "fabric-cuda"),
        ("precision", "nf4-dq", "fabric-bnb"),
        ("precision", "int8_training", "fabric-bnb"),
        ("precision", "deepspeed.bf16-mixed", "fabric-deepspeed"),
    ],
)
def test_the_names_of_our_own_backends_have_an_owner(kind: str, name: str, dist: str) -> None:
    assert Known().owner(kind, name) == dist


def test_a_device_that_only_a_plugin_serves_has_a_hint() -> None:
    assert device_hint("cuda") == "fabric-cuda"
    assert device_hint("cpu") is None


def test_entry_points_that_were_given_are_not_looked_through_without_end() -> None:
    assert "nothing_of_that_name" in refusal(Registry(entry_points=()), "nothing_of_that_name")
