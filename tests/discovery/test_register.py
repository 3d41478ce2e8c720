"""What the program registers by itself, and how objects are made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.registry import Registry, get_registry
from plugin_site import PluginSite


class Mine:
    def __init__(self, a: int = 0, *, b: int = 0) -> None:
        self.got = (a, b)

    @classmethod
    def preset(cls, a: int = 7) -> Mine:
        return cls(a)


def test_a_registered_class_is_known_until_it_is_undone(registry: Registry) -> None:
    undo = registry.register("strategy", "my-own", Mine)
    assert registry.resolve("strategy", "MY_OWN") is Mine
    assert "my-own" in registry.names("strategy")
    undo()
    undo()
    assert "my-own" not in registry.names("strategy")


def test_it_decorates(registry: Registry) -> None:
    @registry.register("strategy", "local")
    class Local: ...

    assert registry.create("strategy", "local").__class__ is Local


def test_an_import_string_is_imported_when_it_is_used(registry: Registry) -> None:
    registry.register("logger", "ordered", "collections:OrderedDict")
    assert registry.create("logger", "ordered") == {}


def test_it_comes_before_installed_plugins(registry: Registry, site: PluginSite) -> None:
    site.strategy("fabric-foo", "foo")
    registry.register("strategy", "foo", Mine)
    assert registry.resolve("strategy", "foo") is Mine
    installed = next(ref for ref in registry.refs("strategy") if ref.dist == "fabric-foo")
    assert (installed.status, installed.reason) == ("shadowed", "the name is registered at run time")


@pytest.mark.parametrize("name", ["ddp", "DDP", "mine"])
def test_a_name_in_use_needs_override(registry: Registry, name: str) -> None:
    registry.register("strategy", "mine", Mine)
    with pytest.raises(ValueError, match="registered already: pass override=True"):
        registry.register("strategy", name, Mine)
    undo = registry.register("strategy", name, dict, override=True)
    assert registry.resolve("strategy", name) is dict
    undo()
    assert registry.find("strategy", name).value != "builtins:dict"


def test_what_cannot_be_called_or_named_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidTypeError, match="target=3 cannot be registered: pass a class"):
        registry.register("strategy", "three", 3)  # type: ignore[call-overload]
    with pytest.raises(InvalidArgumentError, match="must be text without a colon"):
        registry.register("strategy", "a:b", Mine)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(Mine, (1, 2)), (Mine.preset, (1, 0)), (lambda **kw: Mine(kw["c"]), (3, 0)), (lambda: Mine(), (0, 0))],
)
def test_only_keywords_that_the_target_takes_are_passed(
    registry: Registry, target: Any, expected: tuple[int, int]
) -> None:
    registry.register("strategy", "mine", target)
    assert registry.create("strategy", "mine", a=1, b=2, c=3).got == expected


def test_several_threads_get_the_same_class_and_one_scan(registry: Registry, site: PluginSite) -> None:
    module = site.strategy("fabric-foo", "foo")
    site.module(module, "import time; time.sleep(0.05)\nclass Made: ...")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.resolve("strategy", "foo"), range(8)))
    assert len(set(found)) == 1
    assert registry._discovery.scans == 1


def test_there_is_one_registry_per_process() -> None:
    assert get_registry() is get_registry()
