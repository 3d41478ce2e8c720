"""Which accelerator and which devices."""

import dataclasses
import logging

import pytest
import torch

from fabric_core import Fabric
from fabric_core.abc.hooks import Candidate, hookimpl
from fabric_core.accelerators import CPUAccelerator, GenericAccelerator, MPSAccelerator
from fabric_core.environments.torchelastic import TorchElasticEnvironment
from fabric_core.errors import AmbiguousPluginError, MisconfigurationException
from fabric_core.plugins import LightningEnvironment
from fabric_core.registry import get_registry
from fabric_core.resolve.devices import choose_devices
from fabric_core.resolve.objects import Objects
from fabric_core.resolve.pipeline import resolve
from fabric_core.resolve.request import DEFAULTS, Request
from fabric_core.strategies import DDPStrategy
from fabric_core.testing import FakeAccelerator


@pytest.fixture
def hooks():
    """Adds a plugin's hooks until the end of the test."""
    undo = []
    yield lambda plugin: undo.append(get_registry().add_hooks(plugin))
    for each in undo:
        each()


class Offering:
    """A plugin that offers accelerators."""

    def __init__(self, *candidates):
        self.candidates = candidates

    @hookimpl
    def fabric_accelerator_candidates(self, ctx):
        return self.candidates


def offer(priority=50, available=True, name="fake", **more):
    return Candidate(name, priority, available, "because", frozenset({"gpu"}), **more)


def devices(**arguments):
    return resolve(arguments).devices


@pytest.mark.parametrize(
    ("asked", "count"),
    [(2, 2), ("2", 2), (-1, 4), ("-1", 4), ([0, 2], 2), ("0,2", 2), ("1,", 1), ("[1, 3]", 2), ((0, 1), 2), ("auto", 4)],
)
def test_spellings_of_devices(asked, count, fake_backend):
    assert len(devices(accelerator="fake", strategy="fake", devices=asked).value) == count


@pytest.mark.parametrize("asked", [5, [0, 9], "7,", -2, [1, 1], "one"])
def test_devices_that_are_not_there(asked, fake_backend):
    with pytest.raises(MisconfigurationException, match="devices="):
        devices(accelerator="fake", strategy="fake", devices=asked)


@pytest.mark.parametrize("asked", [1.5, [0.5], [True], True, {"a": 1}])
def test_devices_of_a_wrong_type(asked, fake_backend):
    with pytest.raises(TypeError, match="Expected a count"):
        devices(accelerator="fake", strategy="fake", devices=asked)


def test_the_best_offer_wins(fake_backend, hooks):
    hooks(Offering(offer()))
    accelerator = resolve({"strategy": "fake"}).accelerator
    assert (accelerator.name, accelerator.origin, accelerator.reason) == ("fake", "auto", "because")


def test_an_offer_that_is_not_available_is_passed_over(fake_backend, hooks):
    hooks(Offering(offer(available=False)))
    assert resolve().accelerator.name == "cpu"


def test_an_offer_may_answer_to_its_alias_only(fake_backend, hooks):
    hooks(Offering(offer(auto=False)))
    assert resolve().accelerator.name == "cpu"
    assert resolve({"accelerator": "gpu", "strategy": "fake"}).accelerator.name == "fake"


def test_gpu_is_whatever_gpu_there_is(fake_backend, hooks):
    hooks(Offering(offer()))
    accelerator = resolve({"accelerator": "GPU", "strategy": "fake"}).accelerator
    assert (accelerator.name, accelerator.origin) == ("fake", "accelerator='GPU'")
    assert accelerator.reason == "the best available gpu"


def test_gpu_without_any_lists_the_reasons_and_what_there_is(fake_backend, hooks):
    hooks(Offering(offer(available=False)))
    with pytest.raises(
        RuntimeError, match=r"accelerator='gpu': none is available.*fake: because.*Available here: 'cpu'"
    ):
        resolve({"accelerator": "gpu"})


def test_a_tie_is_an_error_that_names_both(fake_backend, hooks):
    undo = get_registry().register("accelerator", "other", FakeAccelerator)
    hooks(Offering(offer(), offer(name="other")))
    with pytest.raises(AmbiguousPluginError, match="priority 50: 'fake', 'other'"):
        resolve()
    with pytest.raises(AmbiguousPluginError, match="accelerator for 'gpu'"):
        resolve({"accelerator": "gpu"})
    undo()


def test_a_tie_below_the_best_does_not_matter(fake_backend, hooks):
    hooks(Offering(offer(), offer(priority=3), offer(priority=3, name="other")))
    assert resolve({"strategy": "fake"}).accelerator.name == "fake"


class Absent(FakeAccelerator):
    available = False

    @classmethod
    def unavailable_reason(cls):
        return "it was unplugged"


@pytest.mark.parametrize("given", [Absent, Absent()], ids=["class", "object"])
def test_an_accelerator_that_is_not_there_says_why(given):
    with pytest.raises(RuntimeError, match=r"'fake' is not available: it was unplugged. Available here: 'cpu'"):
        Fabric(accelerator=given)


def test_an_accelerator_inside_a_strategy_must_be_there_too():
    with pytest.raises(RuntimeError, match="it was unplugged"):
        Fabric(strategy=DDPStrategy(accelerator=Absent()))


@pytest.mark.parametrize("cls", [CPUAccelerator, GenericAccelerator, MPSAccelerator])
def test_cores_own_are_found_by_their_names(cls):
    assert get_registry().resolve("accelerator", cls.name()) is cls


def as_torchrun(monkeypatch, processes=3):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": 1,
        "LOCAL_RANK": 1,
        "GROUP_RANK": 0,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
    }.items():
        monkeypatch.setenv(name, str(value))


def test_torchruns_processes_decide_how_many_devices_auto_means(monkeypatch):
    as_torchrun(monkeypatch)
    plan = resolve({"accelerator": "cpu"})
    assert (len(plan.devices.value), plan.strategy.name, plan.environment.name) == (3, "ddp", "torchelastic")
    assert plan.devices.reason == "TorchElasticEnvironment: 3 processes run on this node"


def test_torchruns_processes_have_a_device_each(monkeypatch):
    as_torchrun(monkeypatch)
    fabric = Fabric(accelerator="cpu")
    assert fabric.device == torch.device("cpu")
    assert (fabric.global_rank, fabric.local_rank, fabric.world_size) == (1, 1, 3)
    assert fabric.strategy.launcher is None


def test_another_number_than_torchrun_started_is_refused(monkeypatch):
    as_torchrun(monkeypatch)
    with pytest.raises(ValueError, match=r"2 processes, but 3 were started.*torchrun --nproc-per-node 2"):
        Fabric(accelerator="cpu", devices=2)


def test_the_environment_is_torchruns_only_if_torchrun_says_so(monkeypatch):
    assert type(resolve().environment.value) is LightningEnvironment
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    plan = resolve()
    assert type(plan.environment.value) is TorchElasticEnvironment
    assert (plan.environment.origin, plan.environment.reason) == ("auto", "TORCHELASTIC_RUN_ID is set")


def test_an_environment_that_was_given_is_not_detected(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    given = LightningEnvironment()
    assert resolve({}, given).environment.value is given


class Notebook(FakeAccelerator):
    interactive_devices = 1


def test_a_notebook_gets_fewer_devices_and_is_told(caplog):
    request = dataclasses.replace(Request.gather(dict(DEFAULTS)), interactive=True)
    with caplog.at_level(logging.INFO, logger="fabric_core"):
        chosen = choose_devices(request, Objects(), Notebook(), LightningEnvironment())
    assert (len(chosen.value), chosen.reason) == (1, "an interactive session")
    assert "strategy='ddp_notebook'" in caplog.text


def test_a_notebook_gets_the_devices_it_asks_for():
    request = dataclasses.replace(Request.gather({**DEFAULTS, "devices": 3}), interactive=True)
    assert len(choose_devices(request, Objects(), Notebook(), LightningEnvironment()).value) == 3


def test_a_script_gets_all_devices():
    request = Request.gather(dict(DEFAULTS))
    assert len(choose_devices(request, Objects(), Notebook(), LightningEnvironment()).value) == 4
