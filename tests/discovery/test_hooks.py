"""Hook modules are loaded when hooks are first used; one that is broken costs its own plugin only."""

from __future__ import annotations

import sys
from typing import Any

import pluggy
import pytest

from fabric_core.abc.hooks import Candidate, ResolveContext, hookimpl
from fabric_core.errors import InvalidArgumentError, PluginLoadError
from fabric_core.registry import Registry
from fabric_core.registry.hooks import PluginWarning
from fabric_core.registry.hookspecs import HookSpecs
from plugin_site import PluginSite

GOOD = """
    from fabric_core.abc.hooks import Candidate, hookimpl
    told = []

    @hookimpl
    def fabric_accelerator_candidates(ctx):
        return Candidate(ctx.accelerator, priority=20, available=True)

    @hookimpl
    def fabric_on_init(fabric):
        told.append(fabric)
"""
NAMES_DEVICE = ResolveContext(accelerator="device")


def install(site: PluginSite, dist: str, source: str, value: str = "") -> str:
    module = dist.replace("-", "_")
    site.module(module, source)
    site.dist(dist, {"fabric.hooks": {dist: value or module}})
    return module


def offers(registry: Registry) -> list[Any]:
    return registry.hooks.fabric_accelerator_candidates(ctx=NAMES_DEVICE)


def test_hook_modules_wait_until_hooks_are_used(registry: Registry, site: PluginSite) -> None:
    module = install(site, "fabric-foo", GOOD)
    registry.refs()
    registry.find("strategy", "ddp")
    assert module not in sys.modules
    assert offers(registry) == [Candidate("device", 20, True)]
    registry.hooks.fabric_on_init(fabric="me")
    assert sys.modules[module].told == ["me"]


def test_a_hook_nobody_implements_is_known_without_a_call(registry: Registry, site: PluginSite) -> None:
    install(site, "fabric-foo", GOOD)
    assert registry.has_hook("fabric_on_init")
    assert not registry.has_hook("fabric_on_save")
    assert not registry.has_hook("fabric_create")
    with pytest.raises(InvalidArgumentError, match="'fabric_on_sve' is no hook: use one of"):
        registry.has_hook("fabric_on_sve")


@pytest.mark.parametrize(
    "source",
    [
        "import no_such_backend",
        "from fabric_core.abc.hooks import hookimpl\n@hookimpl\ndef fabric_on_instal(fabric): ...",
        "from fabric_core.abc.hooks import hookimpl\n@hookimpl\ndef fabric_on_init(fabrik): ...",
        "from fabric_core.abc.hooks import hookimpl\n@hookimpl\ndef fabric_register(registry): 1 / 0",
        "from fabric_core.abc.hooks import hookimpl\n@hookimpl(wrapper=True)\ndef fabric_on_init(): return (yield)",
        "raise NameError",
    ],
    ids=[
        "import fails",
        "hook misspelt",
        "argument misspelt",
        "registering fails",
        "wraps an observer",
        "module fails",
    ],
)
def test_a_broken_hook_module_warns_once_and_names_its_distribution(
    registry: Registry, site: PluginSite, source: str
) -> None:
    install(site, "fabric-bad", source)
    install(site, "fabric-foo", GOOD)
    with pytest.warns(PluginWarning, match=r"the hooks of fabric-bad 1\.0 are not used") as warned:
        assert len(offers(registry)) == 1
    assert len(offers(registry)) == len(warned) == 1
    subjects = [finding.subject for finding in registry.diagnose()]
    assert subjects.count("fabric-bad 1.0") == 1
    assert not any("fabric-foo" in subject for subject in subjects)


def test_strictness_makes_it_an_error(registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "fabric-bad", "import no_such_backend")
    monkeypatch.setenv("FABRIC_PLUGINS_STRICT", "1")
    with pytest.raises(PluginLoadError, match=r"the hooks of fabric-bad 1\.0 are not used"):
        registry.has_hook("fabric_on_init")


def test_a_hook_for_a_newer_core_can_be_optional(registry: Registry, site: PluginSite) -> None:
    source = "from fabric_core.abc.hooks import hookimpl\n@hookimpl(optionalhook=True)\ndef fabric_on_later(x): ..."
    install(site, "fabric-foo", source)
    assert not registry.has_hook("fabric_on_init")


@pytest.mark.parametrize(
    ("variable", "value"), [("FABRIC_PLUGINS_BLOCK", "fabric-bad"), ("FABRIC_DISABLE_PLUGIN_AUTOLOAD", "1")]
)
def test_what_is_kept_out_is_not_imported(
    registry: Registry, site: PluginSite, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    module = install(site, "fabric-bad", "import no_such_backend")
    monkeypatch.setenv(variable, value)
    assert offers(registry) == []
    assert module not in sys.modules


def test_hooks_for_another_core_are_not_imported(registry: Registry, site: PluginSite) -> None:
    site.module("foo_hooks", GOOD)
    site.dist("fabric-foo", {"fabric.hooks": {"foo": "foo_hooks"}}, requires=["fabric-core>=99"])
    with pytest.warns(PluginWarning, match="it needs fabric-core>=99"):
        assert not registry.has_hook("fabric_on_init")
    assert "foo_hooks" not in sys.modules


@pytest.mark.parametrize("body", ["raise KeyError('x')", "yield 1 / 0"])
def test_an_implementation_that_raises_is_passed_over(registry: Registry, site: PluginSite, body: str) -> None:
    install(
        site,
        "fabric-bad",
        f"from fabric_core.abc.hooks import hookimpl\n@hookimpl\ndef fabric_accelerator_candidates(): {body}",
    )
    install(site, "fabric-foo", GOOD)
    with pytest.warns(PluginWarning, match="fabric_accelerator_candidates of fabric-bad::fabric-bad failed"):
        assert offers(registry) == [Candidate("device", 20, True)]


def test_hooks_may_be_a_class(registry: Registry, site: PluginSite) -> None:
    source = """
        from fabric_core.abc.hooks import hookimpl
        from fabric_core.registry.hookspecs import HookSpecs

        class Hooks(HookSpecs):
            @hookimpl
            def fabric_environment_report(self):
                return {"driver": 3}
    """
    install(site, "fabric-foo", source, value="fabric_foo:Hooks")
    assert registry.hooks.fabric_environment_report() == [{"driver": 3}]
    assert not registry.has_hook("fabric_on_init")


def test_two_entries_with_one_module_are_loaded_once(registry: Registry, site: PluginSite) -> None:
    install(site, "fabric-foo", GOOD)
    site.dist("fabric-fork", {"fabric.hooks": {"fork": "fabric_foo"}})
    with pytest.warns(PluginWarning, match="fabric_foo is already the hook module of fabric-foo"):
        assert len(offers(registry)) == 1


REGISTERS = """
    from fabric_core.abc.hooks import hookimpl

    @hookimpl
    def fabric_register(registry):
        registry.register("strategy", "dynamic", dict)
"""


def test_names_that_cannot_be_static_are_registered_before_one_is_given_up(
    registry: Registry, site: PluginSite
) -> None:
    install(site, "fabric-foo", REGISTERS)
    assert registry.resolve("strategy", "dynamic") is dict


def test_hooks_installed_meanwhile_join_those_loaded(registry: Registry, site: PluginSite) -> None:
    install(site, "fabric-foo", GOOD)
    assert not registry.has_hook("fabric_register")
    install(site, "fabric-late", REGISTERS)
    assert registry.resolve("strategy", "dynamic") is dict
    assert len(offers(registry)) == 1


def test_creation_can_be_replaced_and_wrapped(registry: Registry) -> None:
    class Wraps:
        @hookimpl(wrapper=True)
        def fabric_create(self, ref: Any) -> Any:
            return ref.name, (yield)

    class Replaces:
        @hookimpl
        def fabric_create(self, target: Any, kwargs: Any) -> Any:
            return "replaced" if target is list else None

    remove = registry.add_hooks(Wraps())
    registry.add_hooks(Replaces())
    assert registry.create("logger", "collections:OrderedDict", a=1) == ("collections:OrderedDict", {"a": 1})
    assert registry.create("logger", list) == ("list", "replaced")
    remove()
    assert registry.create("logger", list) == "replaced"


def test_an_error_of_the_creation_stays_what_it_is(registry: Registry) -> None:
    class Fails:
        @hookimpl
        def fabric_create(self) -> Any:
            raise ZeroDivisionError

    registry.add_hooks(Fails())
    with pytest.raises(ZeroDivisionError):
        registry.create("logger", dict)


def test_core_answers_last(site: PluginSite) -> None:
    answer = "from fabric_core.abc.hooks import hookimpl\n@hookimpl\ndef fabric_select_strategy(ctx): return {!r}"
    site.module("core_hooks", answer.format("core's"))
    install(site, "fabric-foo", answer.format("the plugin's"))
    registry = Registry(hook_modules={"fabric-core": "core_hooks"})
    assert registry.hooks.fabric_select_strategy(ctx=ResolveContext()) == "the plugin's"


def test_a_hook_module_cannot_use_hooks_while_it_is_loaded(registry: Registry, site: PluginSite) -> None:
    source = """
        from fabric_core.abc.hooks import hookimpl

        @hookimpl
        def fabric_register(registry):
            registry.has_hook("fabric_on_init")
    """
    install(site, "fabric-foo", source)
    with pytest.warns(PluginWarning, match="hooks are used while they are being loaded: move the call into a function"):
        assert not registry.has_hook("fabric_on_init")


def test_every_hook_is_documented_and_reaches_its_implementation(registry: Registry) -> None:
    specs = {name: spec for name, spec in vars(HookSpecs).items() if name.startswith("fabric_")}
    called: list[str] = []

    class All: ...

    for name, spec in specs.items():
        assert spec.__doc__, f"{name} needs a docstring that tells a plugin's author when it is called"
        arguments = spec.__code__.co_varnames[1 : spec.__code__.co_argcount]
        namespace: dict[str, Any] = {"called": called}
        exec(f"def {name}(self, {', '.join(arguments)}): called.append({name!r})", namespace)
        setattr(All, name, hookimpl(namespace[name]))
    registry.add_hooks(All())
    for name, spec in specs.items():
        arguments = spec.__code__.co_varnames[1 : spec.__code__.co_argcount]
        assert registry.has_hook(name)
        if name != "fabric_register":  # called by the registration itself
            values = {"kwargs": {}, "target": dict}
            getattr(registry.hooks, name)(**{argument: values.get(argument) for argument in arguments})
    assert sorted(called) == sorted(specs)


def test_the_specification_is_one_that_pluggy_accepts() -> None:
    manager = pluggy.PluginManager("fabric")
    manager.add_hookspecs(HookSpecs)
    manager.check_pending()


def test_an_error_in_a_hook_of_core_is_not_excused(site: PluginSite) -> None:
    site.module("core_hooks", GOOD.replace("told.append(fabric)", "raise LookupError('ours')"))
    registry = Registry([], hook_modules={"fabric-core.x": "core_hooks"})
    with pytest.raises(LookupError, match="ours"):
        registry.hooks.fabric_on_init(fabric="me")


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("fabric_environment_candidates", dict(ctx=None)),
        ("fabric_accelerator_candidates", dict(ctx=None)),
        ("fabric_select_strategy", dict(ctx=None)),
        ("fabric_validate", dict(plan=None)),
    ],
)
def test_an_answer_of_a_wrong_type_is_blamed_on_the_plugin(registry: Registry, hook: str, call: dict[str, Any]) -> None:
    plugin = type("Plugin", (), {})()
    function = lambda **kwargs: 5  # noqa: E731
    setattr(plugin, hook, hookimpl(_with_arguments(function, call)))
    registry.add_hooks(plugin, "fabric-odd::odd")
    with pytest.warns(UserWarning, match=r"fabric-odd.*answered 5"):
        getattr(registry.hooks, hook)(**call)


def _with_arguments(function: Any, call: dict[str, Any]) -> Any:
    (name,) = call
    return {"ctx": lambda ctx: function(ctx=ctx), "plan": lambda plan: function(plan=plan)}[name]
