"""Which strategy: rules for ``"auto"``, substitutes, and what plugins may say."""

import sys

import pytest

from fabric_core import Fabric
from fabric_core.abc.choosing import ResolveContext
from fabric_core.abc.hooks import Problem, hookimpl
from fabric_core.registry import get_registry
from fabric_core.resolve.pipeline import resolve
from fabric_core.resolve.request import DEFAULTS, Request
from fabric_core.resolve.strategy import choose_strategy
from fabric_core.testing import FakeAccelerator, FakeStrategy


@pytest.fixture
def hooks():
    """Adds a plugin's hooks until the end of the test."""
    undo = []
    yield lambda plugin: undo.append(get_registry().add_hooks(plugin))
    for each in undo:
        each()


def chosen(name="auto", **known):
    request = Request.gather({**DEFAULTS, "strategy": name})
    context = ResolveContext(**{"accelerator": "cpu", **known})
    accelerator = get_registry().create("accelerator", context.accelerator)
    return choose_strategy(request, accelerator, get_registry(), context)


@pytest.mark.parametrize(
    ("known", "name", "reason"),
    [
        (dict(num_devices=1), "single_device", "one device"),
        (dict(num_devices=1, interactive=True), "single_device", "one device"),
        (dict(num_devices=4), "ddp", "4 devices"),
        (dict(num_devices=4, interactive=True), "ddp_fork", "4 devices in an interactive session"),
        (dict(num_devices=1, num_nodes=3), "ddp", "3 nodes"),
        (dict(num_devices=4, num_nodes=3, interactive=True), "ddp", "3 nodes"),
    ],
)
def test_auto(known, name, reason):
    choice = chosen(**known)
    assert (choice.name, choice.reason, choice.origin) == (name, reason, "auto")


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("ddp", "popen", {}),
        ("ddp_spawn", "spawn", {}),
        ("ddp_fork", "fork", {}),
        ("ddp_notebook", "fork", {}),
        ("ddp_find_unused_parameters_true", "popen", {"find_unused_parameters": True}),
    ],
)
def test_the_names_of_ddp(name, method, options):
    strategy = chosen(name).value
    assert (strategy.start_method, strategy.ddp_kwargs) == (method, options)


def test_dp_on_the_cpu_becomes_ddp_and_says_so():
    with pytest.warns(UserWarning, match="'dp' does not run on accelerator='cpu': using 'ddp' instead"):
        choice = chosen("dp", num_devices=2)
    assert (choice.name, choice.reason) == ("ddp", "'dp' does not run on cpu")


def test_dp_elsewhere_is_a_plugins(fake_backend):
    with pytest.raises(ValueError, match="pip install fabric-cuda"):
        chosen("dp", accelerator="fake", num_devices=2)


class Suggesting:
    """A plugin with opinions on its own accelerator."""

    @hookimpl
    def fabric_select_strategy(self, ctx):
        return "fake" if ctx.accelerator == "fake" and ctx.num_devices > 2 else None

    @hookimpl
    def fabric_select_precision(self, ctx):
        return "64" if ctx.accelerator == "fake" else None


def test_a_plugin_may_suggest_for_its_own_accelerator(fake_backend, hooks):
    hooks(Suggesting())
    plan = resolve({"accelerator": "fake"})
    assert (plan.strategy.name, plan.strategy.reason) == ("fake", "suggested for fake")
    assert (plan.precision.name, plan.precision.reason) == ("64-true", "suggested for fake")


def test_a_plugins_suggestion_gives_way_to_what_was_asked_for(fake_backend, hooks):
    hooks(Suggesting())
    plan = resolve({"accelerator": "fake", "strategy": "ddp", "precision": "bf16-mixed"})
    assert (plan.strategy.name, plan.precision.name) == ("ddp", "bf16-mixed")


def test_a_plugin_without_an_opinion_leaves_it_to_core(fake_backend, hooks):
    hooks(Suggesting())
    plan = resolve({"accelerator": "fake", "devices": 1})
    assert plan.strategy.name == "single_device"
    assert resolve().precision.name == "32-true"


class Objecting:
    """A plugin that knows what cannot work."""

    def __init__(self, *problems):
        self.problems = problems

    @hookimpl
    def fabric_validate(self, plan):
        return self.problems


def test_a_plugins_objection_stops_construction_in_its_own_words(hooks):
    hooks(Objecting(Problem("It is Monday.", "Wait a day.", RuntimeError)))
    with pytest.raises(RuntimeError, match=r"^It is Monday\. Wait a day\.$"):
        Fabric()


def test_all_objections_come_at_once(hooks):
    hooks(Objecting(Problem("It is Monday.", "Wait a day."), Problem("It rains.")))
    hooks(Objecting(Problem("It is cold.", error=TypeError)))
    with pytest.raises(ValueError, match="3 things in this configuration cannot work") as caught:
        Fabric()
    assert all(
        text in str(caught.value) for text in ("  - It is Monday. Wait a day.", "  - It rains.", "  - It is cold.")
    )


def test_no_objection_is_no_error(hooks):
    hooks(Objecting())
    Fabric()


class OneOnly(FakeAccelerator):
    max_devices = 1


def test_a_strategy_for_several_devices_needs_an_accelerator_with_several(fake_backend):
    with pytest.raises(ValueError, match=r"strategy='ddp'.*has one only"):
        resolve({"accelerator": OneOnly(), "devices": 1, "strategy": "ddp"})


def test_problems_of_core_come_at_once(fake_backend):
    with pytest.raises(ValueError, match="2 things") as caught:
        resolve({"accelerator": OneOnly(), "devices": 2, "strategy": "ddp"})
    assert "Use devices=1" in str(caught.value)


class Particular(FakeStrategy):
    supported_accelerators = frozenset({"cuda", "xla"})


def test_a_strategy_names_the_accelerators_it_runs_on(fake_backend):
    with pytest.raises(ValueError, match=r"does not run on accelerator='cpu'.*It runs on: cuda, xla"):
        resolve({"accelerator": "cpu", "devices": 1, "strategy": Particular()})


def test_something_else_under_a_strategys_name_is_the_plugins_defect():
    undo = get_registry().register("strategy", "broken", dict)
    with pytest.raises(TypeError, match=r"made a dict, which is no.*defect of that plugin"):
        resolve({"strategy": "broken"})
    undo()


def test_the_prompt_gets_a_strategy_that_works_there(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert resolve({"accelerator": "cpu", "devices": 2}).strategy.name == "ddp_fork"


def test_the_prompt_refuses_a_strategy_that_runs_the_script_again(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(RuntimeError, match='strategy="ddp_notebook", or devices=1'):
        Fabric(accelerator="cpu", devices=2, strategy="ddp")
