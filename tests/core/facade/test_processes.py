"""Launching, running, printing, seeding and tearing down, in one process."""

import functools
import os
import pickle

import pytest
import torch

from fabric_core import Fabric
from fabric_core.registry import get_registry
from fabric_core.strategies import SingleDeviceStrategy


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


def fake(**arguments):
    return Fabric(accelerator="fake", strategy="fake", devices=2, **arguments)


def test_launch_returns_what_the_function_returned():
    assert cpu().launch(lambda fabric, a, b: (fabric.world_size, a, b), 1, b=2) == (1, 1, 2)


def test_launch_passes_the_fabric_first():
    fabric = cpu()
    assert fabric.launch(lambda given: given) is fabric


def test_launch_without_a_function_returns_nothing_and_can_be_repeated():
    fabric = cpu()
    assert fabric.launch() is None
    assert fabric.launch() is None
    assert fabric.is_launched


def test_launch_runs_each_function_it_is_given():
    fabric = cpu()
    fabric.launch()
    assert [fabric.launch(lambda f, x: x * 2, x) for x in (1, 2)] == [2, 4]


def test_launch_takes_partials_methods_and_open_signatures():
    class Program:
        def main(self, fabric):
            return "method"

    fabric = cpu()
    assert fabric.launch(functools.partial(lambda a, f: a, "partial")) == "partial"
    assert fabric.launch(Program().main) == "method"
    assert fabric.launch(lambda *args: len(args), 1) == 2


def test_the_environment_is_set_up_once(fake_backend):
    fabric = fake()
    fabric.launch()
    fabric.launch(lambda f: None)
    assert fabric.strategy.calls.count("setup_environment") == 1


def test_one_process_needs_no_launch():
    fabric = cpu()
    assert fabric.is_launched
    fabric.barrier()
    assert fabric.broadcast({"a": 1}) == {"a": 1}


def test_several_devices_need_a_launch(fake_backend):
    fabric = fake()
    assert not fabric.is_launched
    with pytest.raises(RuntimeError, match=r"fabric\.launch\(\) first"):
        fabric.setup(torch.nn.Linear(1, 1))
    fabric.launch()
    assert fabric.is_launched


def test_an_error_in_the_function_is_the_callers():
    def main(fabric):
        raise LookupError("in main")

    with pytest.raises(LookupError, match="in main"):
        cpu().launch(main)


class Program(Fabric):
    def __init__(self, **arguments):
        super().__init__(accelerator="cpu", devices=1, **arguments)
        self.note = "state"

    def run(self, a, b=0):
        return self.note, a + b, self._launched


def test_an_overridden_run_launches_first_and_returns_its_result():
    assert Program().run(1, b=2) == ("state", 3, True)


def test_run_of_a_plain_fabric_does_nothing():
    assert cpu().run(1, 2, three=3) is None


def test_an_overridden_run_survives_pickling():
    assert pickle.loads(pickle.dumps(Program())).run(1) == ("state", 1, True)


def test_run_may_be_overridden_twice():
    class Longer(Program):
        def run(self, a):
            return ("longer", *super().run(a))

    assert Longer().run(1) == ("longer", "state", 1, True)


def test_under_the_command_line_a_fabric_is_launched_from_the_start(monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    fabric = Fabric()
    assert fabric._launched
    assert fabric.launch(lambda f: 7) == 7
    assert fabric.launch() is None


def test_print_writes_on_the_first_process_of_the_node(capsys):
    cpu().print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_print_is_silent_on_other_processes_of_the_node(capsys):
    class Second(SingleDeviceStrategy):
        local_rank = 1

    cpu(strategy=Second()).print("nothing")
    assert capsys.readouterr().out == ""


def test_print_speaks_on_every_node(capsys):
    class OtherNode(SingleDeviceStrategy):
        global_rank, local_rank, node_rank, world_size, is_global_zero = 4, 0, 1, 8, False

    fabric = cpu(strategy=OtherNode())
    fabric.print("node", fabric.node_rank)
    assert capsys.readouterr().out == "node 1\n"


def test_one_process_is_rank_zero_of_one():
    fabric = cpu()
    ranks = (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size)
    assert ranks == (0, 0, 0, 1)
    assert fabric.is_global_zero


@pytest.mark.parametrize(("workers", "written"), [(None, "1"), (True, "1"), (False, "0")])
def test_seeding_through_the_facade_seeds_workers_unless_told_otherwise(workers, written):
    assert Fabric.seed_everything(5, workers=workers) == 5
    assert os.environ["PL_SEED_WORKERS"] == written


def test_seeding_repeats_the_numbers():
    cpu().seed_everything(5, verbose=False)
    first = torch.rand(2)
    Fabric.seed_everything(5, verbose=False)
    assert torch.equal(first, torch.rand(2))


def test_teardown_reaches_precision_accelerator_and_strategy(fake_backend):
    fabric = fake()
    fabric.launch()
    fabric.teardown()
    assert fabric.accelerator.torn_down


def test_a_part_that_fails_to_tear_down_keeps_no_other_from_it(fake_backend):
    from fabric_core.abc import Precision

    class Failing(Precision):
        def teardown(self):
            raise OSError("no more")

    fabric = fake(plugins=Failing())
    with pytest.raises(OSError, match="no more"):
        fabric.teardown()
    assert fabric.accelerator.torn_down


class Notes:
    """A plugin that writes down what it is told."""

    def __init__(self):
        from fabric_core.abc.hooks import hookimpl

        self.heard = []
        for name in ("init", "launch", "setup", "save", "load", "teardown"):
            setattr(self, f"fabric_on_{name}", hookimpl(self._listener(name)))

    def _listener(self, name):
        if name == "setup":
            return lambda fabric, module, optimizers: self.heard.append(("setup", module, len(optimizers)))
        if name in ("save", "load"):
            return lambda fabric, path: self.heard.append((name, path.exists()))
        return lambda fabric: self.heard.append(name)


@pytest.fixture
def notes():
    plugin = Notes()
    undo = get_registry().add_hooks(plugin)
    yield plugin.heard
    undo()


def test_plugins_hear_of_the_life_of_a_fabric(notes):
    fabric = cpu()
    fabric.launch()
    fabric.launch()
    fabric.teardown()
    assert notes == ["init", "launch", "teardown"]


def test_plugins_hear_of_modules_and_of_optimizers_alone(notes):
    fabric, module = cpu(), torch.nn.Linear(1, 1)
    wrapped = fabric.setup_module(module)
    fabric.setup_optimizers(torch.optim.SGD(module.parameters()))
    assert notes[1:] == [("setup", wrapped, 0), ("setup", None, 1)]


def test_plugins_hear_of_a_checkpoint_once_it_is_there(notes, tmp_path):
    fabric = cpu()
    fabric.save(tmp_path / "a.ckpt", {"x": 1})
    fabric.load(tmp_path / "a.ckpt")
    assert notes[1:] == [("save", True), ("load", True)]


def test_plugins_hear_nothing_of_a_checkpoint_that_failed(notes, tmp_path):
    with pytest.raises(TypeError):
        cpu().save(tmp_path / "a.ckpt", {"x": torch.utils.data.DataLoader([1])})
    assert "save" not in [note[0] for note in notes]
