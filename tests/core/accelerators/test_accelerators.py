"""Core's accelerators, and how they read ``devices``."""

import pytest
import torch

from fabric_core.accelerators import CPUAccelerator, GenericAccelerator, MPSAccelerator
from fabric_core.accelerators.device_ids import parse_count, parse_device_ids
from fabric_core.errors import MisconfigurationException

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


def test_the_processor_is_always_there():
    assert CPUAccelerator.is_available()
    assert (CPUAccelerator.name(), CPUAccelerator.device_type()) == ("cpu", "cpu")
    assert CPUAccelerator.auto_device_count() == 1


@pytest.mark.parametrize("devices", [1, 3, "2", " 2 "])
def test_the_processor_counts_processes(devices):
    count = CPUAccelerator.parse_devices(devices)
    assert count == int(devices)
    assert CPUAccelerator.get_parallel_devices(count) == [CPU] * count


@pytest.mark.parametrize("devices", [0, -1, 1.0, None, True, "-1", "many", [0], [1, 2], ""])
def test_the_processor_takes_only_counts(devices):
    with pytest.raises(TypeError, match="expected a whole number of at least 1"):
        CPUAccelerator.parse_devices(devices)


def test_the_processor_serves_no_other_device():
    CPUAccelerator().setup_device(CPU)
    with pytest.raises(ValueError, match="cuda:0; it serves cpu only"):
        CPUAccelerator().setup_device(torch.device("cuda", 0))


def test_the_processor_has_nothing_to_release():
    accelerator = CPUAccelerator()
    accelerator.empty_cache()
    accelerator.teardown()
    accelerator.restore_rng(accelerator.capture_rng())


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (2, [0, 1]),
        ("2", [0, 1]),
        (0, []),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        ([3, 1], [3, 1]),
        ((0, 2), [0, 2]),
        ("0,3", [0, 3]),
        ("2,", [2]),
        ("[0, 1]", [0, 1]),
        (" 1, 3 ", [1, 3]),
    ],
)
def test_indices_are_read_from_every_spelling(devices, indices):
    assert parse_device_ids(devices, range(4), "gpu") == indices


def test_indices_follow_what_is_there():
    assert parse_device_ids(-1, [2, 5], "gpu") == [2, 5]
    with pytest.raises(MisconfigurationException, match=r"this machine has \[2, 5\]"):
        parse_device_ids(1, [2, 5], "gpu")
    with pytest.raises(MisconfigurationException, match="this machine has none"):
        parse_device_ids([0], [], "gpu")


def test_an_index_twice_is_refused():
    with pytest.raises(MisconfigurationException, match=r"names a device twice: \[0, 0\]"):
        parse_device_ids([0, 0], range(4), "gpu")


@pytest.mark.parametrize("devices", ["a", "0,b", "1.5", ""])
def test_a_text_that_is_no_device_is_refused(devices):
    with pytest.raises(MisconfigurationException, match="cannot be read"):
        parse_device_ids(devices, range(4), "gpu")


@pytest.mark.parametrize("devices", [None, 1.5, True, [True], ["0"], {0}])
def test_a_type_that_is_no_device_is_refused(devices):
    with pytest.raises(TypeError, match="Expected a count"):
        parse_device_ids(devices, range(4), "gpu")


def test_counts_name_the_accelerator_in_errors():
    with pytest.raises(TypeError, match="accelerator='tpu', devices=2"):
        parse_count("x", "tpu")


@NO_GPU
def test_generic_finds_nothing_on_a_machine_without_devices():
    assert not GenericAccelerator.is_available()
    assert GenericAccelerator.auto_device_count() == 0
    assert f"torch {torch.__version__} reports no device" in GenericAccelerator.unavailable_reason()
    with pytest.raises(RuntimeError, match="finds no device"):
        GenericAccelerator.device_type()


@NO_GPU
def test_apples_gpu_is_not_here():
    assert not MPSAccelerator.is_available()
    assert (MPSAccelerator.name(), MPSAccelerator.max_devices) == ("mps", 1)
    assert MPSAccelerator.get_parallel_devices(1) == [torch.device("mps", 0)]
    with pytest.raises(MisconfigurationException):
        MPSAccelerator.parse_devices(2)
    with pytest.raises(ValueError, match="serves mps only"):
        MPSAccelerator().setup_device(CPU)


def test_gpu_is_another_name_of_those_that_are_one():
    assert "gpu" in GenericAccelerator.aliases & MPSAccelerator.aliases
    assert "gpu" not in CPUAccelerator.aliases


def test_real_devices_come_before_the_processor():
    assert MPSAccelerator.priority > GenericAccelerator.priority > CPUAccelerator.priority
