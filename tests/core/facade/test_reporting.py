"""Callbacks and loggers."""

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.abc import Logger
from fabric_core.errors import NoLoggerError


class Memory(Logger):
    """Keeps what it was sent."""

    name, version = "memory", 0

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((dict(metrics), step))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


def test_the_callers_list_of_callbacks_stays_as_it_was():
    mine = []
    fabric = cpu(callbacks=mine)
    fabric.callbacks.append(object())
    assert mine == []


@pytest.mark.parametrize("given", [None, [], ()])
def test_no_callbacks_make_an_empty_list(given):
    assert cpu(callbacks=given).callbacks == []


def test_one_callback_needs_no_list():
    callback = object()
    assert cpu(callbacks=callback).callbacks == [callback]


def test_the_callers_list_of_loggers_stays_as_it_was():
    mine = [Memory()]
    fabric = cpu(loggers=mine)
    fabric.loggers.append(Memory())
    assert len(mine) == 1


def test_the_logger_is_the_first_of_the_loggers():
    first, second = Memory(), Memory()
    assert cpu(loggers=[first, second]).logger is first
    assert cpu(loggers=first).loggers == [first]


def test_without_a_logger_asking_for_it_teaches():
    with pytest.raises(NoLoggerError, match=r"append to fabric\.loggers") as caught:
        cpu().logger  # noqa: B018
    assert isinstance(caught.value, IndexError)


def test_logging_without_loggers_is_no_error():
    cpu().log("loss", 1.0)


def test_a_logger_added_later_hears_too():
    fabric, late = cpu(), Memory()
    fabric.loggers.append(late)
    fabric.log("loss", 1.5, step=2)
    assert late.rows == [({"loss": 1.5}, 2)]


def test_every_logger_gets_every_metric():
    loggers = [Memory(), Memory()]
    cpu(loggers=loggers).log_dict({"loss": 0.5, "accuracy": 1}, step=7)
    assert [logger.rows for logger in loggers] == [[({"loss": 0.5, "accuracy": 1}, 7)]] * 2


def test_the_step_may_be_left_to_the_logger():
    logger = Memory()
    cpu(loggers=logger).log("loss", 0.5)
    assert logger.rows[0][1] is None


@pytest.mark.parametrize(
    "tensor", [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2.0, requires_grad=True)]
)
def test_tensors_of_one_element_arrive_as_numbers(tensor):
    logger = Memory()
    cpu(loggers=logger).log("loss", tensor)
    value = logger.rows[0][0]["loss"]
    assert value == 2.0
    assert type(value) is float


def test_a_larger_tensor_is_refused_and_nothing_is_logged():
    logger = Memory()
    with pytest.raises(ValueError, match=r"one element, got one of shape \(2,\)"):
        cpu(loggers=logger).log_dict({"fine": 1.0, "large": torch.ones(2)})
    assert logger.rows == []


def test_a_registered_logger_can_be_named():
    from fabric_core.registry import get_registry

    undo = get_registry().register("logger", "memory", Memory)
    try:
        assert type(cpu(loggers="memory").logger) is Memory
    finally:
        undo()


class Recorder:
    def __init__(self, log):
        self.log = log

    def on_epoch(self, epoch, loss=None):
        self.log.append(("some", epoch, loss))

    def on_everything(self, **kwargs):
        self.log.append(("all", kwargs))

    def on_nothing(self):
        self.log.append("none")

    def on_position(self, first, *, second):
        self.log.append((first, second))


def test_call_runs_the_hook_of_every_callback_in_order():
    log = []

    class Other:
        def on_nothing(self):
            log.append("other")

    cpu(callbacks=[Recorder(log), Other()]).call("on_nothing")
    assert log == ["none", "other"]


def test_call_leaves_out_keywords_that_the_hook_does_not_take():
    log = []
    cpu(callbacks=Recorder(log)).call("on_epoch", epoch=1, batch=2)
    cpu(callbacks=Recorder(log)).call("on_nothing", epoch=1)
    assert log == [("some", 1, None), "none"]


def test_call_passes_everything_to_a_hook_with_open_keywords():
    log = []
    cpu(callbacks=Recorder(log)).call("on_everything", epoch=1, batch=2)
    assert log == [("all", {"epoch": 1, "batch": 2})]


def test_call_passes_positions_on():
    log = []
    cpu(callbacks=Recorder(log)).call("on_position", 1, second=2, third=3)
    assert log == [(1, 2)]


def test_call_of_a_hook_that_nobody_has_is_no_error():
    cpu(callbacks=object()).call("on_anything", value=1)
    cpu().call("on_anything")


def test_call_skips_what_is_no_method_with_a_warning():
    class Odd:
        on_epoch = 3

    log = []
    with pytest.warns(UserWarning, match=r"Odd\.on_epoch is a int, not a method"):
        cpu(callbacks=[Odd(), Recorder(log)]).call("on_epoch", epoch=1)
    assert log == [("some", 1, None)]


def test_call_trusts_the_caller_where_a_signature_is_hidden():
    class Hidden:
        on_values = dict  # a type whose signature Python does not show

    cpu(callbacks=Hidden()).call("on_values", a=1)


def test_errors_in_a_callback_reach_the_caller():
    class Failing:
        def on_epoch(self):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        cpu(callbacks=Failing()).call("on_epoch")


def test_every_step_of_the_optimizer_is_told():
    steps = []

    class Stepped:
        def on_after_optimizer_step(self, strategy, optimizer):
            steps.append((strategy, optimizer))

    fabric = cpu(callbacks=Stepped())
    module = nn.Linear(2, 1)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    _, optimizer = fabric.setup(module, inner)
    optimizer.step()
    optimizer.step()
    assert steps == [(fabric.strategy, inner)] * 2


def test_a_callback_added_after_setup_hears_of_steps():
    fabric, module, steps = cpu(), nn.Linear(2, 1), []

    class Late:
        def on_after_optimizer_step(self, optimizer, **kwargs):
            steps.append(optimizer)

    _, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.callbacks.append(Late())
    optimizer.step()
    assert len(steps) == 1
