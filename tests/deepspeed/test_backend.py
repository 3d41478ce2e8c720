"""Importing DeepSpeed: once, for the right kind of device, in silence, and with errors that say what to do.

Each script runs in a process of its own, because DeepSpeed is imported once in a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fabric_deepspeed
from fabric_core.errors import UsageError
from fabric_deepspeed.backend import OLDEST, check_first_devices
from fabric_deepspeed.build_locks import abandoned_locks, extension_folder

PROJECT = Path(fabric_deepspeed.__file__).parents[2] / "pyproject.toml"


def script(code, *, path=None, **environment):
    """What a process prints that runs ``code``; ``path`` comes first on its import path."""
    known = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    known.update(environment)
    if path is not None:
        known["PYTHONPATH"] = os.pathsep.join(map(str, [path, *sys.path]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=known)
    assert done.returncode == 0, done.stderr
    return done.stdout


def distribution(folder, version, code):
    """A package named deepspeed, as an installer would leave it."""
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text(code)
    metadata = folder / f"deepspeed-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    return folder


CAUGHT = """
from fabric_deepspeed.backend import load
try:
    load("cpu")
except Exception as error:
    print(type(error).__name__, isinstance(error, ImportError), error, repr(error.__cause__), sep="\\n")
"""


def test_a_release_that_is_too_old_is_refused_before_it_is_imported(tmp_path):
    old = distribution(tmp_path, "0.15.4", "raise AssertionError")
    name, _, text, cause = script(CAUGHT, path=old).splitlines()
    assert name == "IncompatiblePluginError"
    assert "DeepSpeed 0.15.4 is installed" in text
    assert f"pip install --upgrade 'deepspeed>={OLDEST}'" in text
    assert cause == "None"


def test_a_broken_native_library_is_told_with_its_cause(tmp_path):
    broken = distribution(tmp_path, "99.1", "raise OSError('libcudart.so.12: cannot open shared object file')")
    name, is_import_error, text, cause = script(CAUGHT, path=broken).splitlines()
    assert (name, is_import_error) == ("PluginLoadError", "True")
    assert "importing it for devices of type 'cpu' failed: OSError: libcudart.so.12" in text
    assert cause.startswith("OSError(")


WITHOUT = """
import sys
class Nothing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
from fabric_core import Fabric
try:
    Fabric(accelerator="cpu", devices=1, strategy="deepspeed")
except ImportError as error:
    print(error)
"""


def test_without_deepspeed_the_strategy_says_what_to_install():
    assert "pip install deepspeed" in script(WITHOUT)


ENVIRONMENT = """
import logging, os, sys, warnings
import torch
def state():
    root = logging.getLogger()
    known = {name: value for name, value in os.environ.items() if name != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    return known, list(warnings.filters), list(root.handlers), root.level, torch.nn.functional.linear
before = state()
from fabric_deepspeed.backend import load
first = load("cpu")
assert state() == before
assert load("cpu") is load(None) is first is sys.modules["deepspeed"]
print(first.accelerator.get_accelerator()._name)
"""


def test_it_is_imported_for_the_device_once_and_without_a_trace():
    """DeepSpeed itself sets PYTORCH_NVML_BASED_CUDA_CHECK, so that processes can still be forked."""
    assert script(ENVIRONMENT) == "cpu\n"


def test_a_device_that_contradicts_the_environment_is_an_error():
    name, _, text, _ = script(CAUGHT, DS_ACCELERATOR="xpu").splitlines()
    assert name == "UsageError"
    assert "DS_ACCELERATOR=xpu" in text
    assert "'cpu'" in text


def test_an_empty_variable_stays_empty():
    assert script(CAUGHT + "import os; print(repr(os.environ['DS_ACCELERATOR']))", DS_ACCELERATOR="") == "''\n"


def test_the_environment_may_say_the_same():
    assert script(CAUGHT + "import os; print(os.environ['DS_ACCELERATOR'])", DS_ACCELERATOR="cpu") == "cpu\n"


OTHER = """
from fabric_deepspeed.backend import load
load("cpu")
try:
    load("cuda")
except RuntimeError as error:
    print(error)
"""


def test_another_kind_of_device_later_in_the_process_is_an_error():
    text = script(OTHER)
    assert "DeepSpeed works on 'cpu' in this process" in text
    assert "DS_ACCELERATOR=cuda" in text


COMMUNICATING = """
import sys
import torch.distributed as dist
from fabric_deepspeed.backend import load, start_communication
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed = load("cpu")
backend = sys.modules["deepspeed.comm.torch"]
build = backend.build_shm_op
start_communication(deepspeed, "gloo")
assert backend.build_shm_op is build
print(deepspeed.comm.is_initialized())
"""


def test_nothing_is_compiled_to_train_on_cpus(tmp_path):
    """No compiler can be found, and nothing is left where compiled parts go."""
    assert script(COMMUNICATING, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path)) == "True\n"
    assert list(tmp_path.iterdir()) == []


UNBUILDABLE = """
import torch.distributed as dist
from fabric_deepspeed.backend import load, start_communication
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed = load("cpu")
def initialise(**_):
    raise OSError("libnothing.so: cannot open shared object file")
deepspeed.init_distributed = initialise
try:
    start_communication(deepspeed, "gloo")
except ImportError as error:
    print(error, repr(error.__cause__), sep="\\n")
"""


def test_a_native_part_that_cannot_be_used_is_told_with_its_cause():
    text, cause = script(UNBUILDABLE).splitlines()
    assert "could not build or load one of its native parts" in text
    assert "pip install ninja py-cpuinfo" in text
    assert "libnothing.so" in cause


def test_the_oldest_release_is_the_one_that_is_declared():
    assert f'"deepspeed>={OLDEST.removesuffix(".0")}' in PROJECT.read_text(encoding="utf-8")


def lock(folder, age, now):
    """A lock beside an object file that was written ``age`` seconds ago."""
    folder.mkdir(parents=True)
    for name in ("lock", "build.ninja", "part.o"):
        (folder / name).touch()
        os.utime(folder / name, (now - age, now - age))
    return folder / "lock"


def test_locks_of_builds_that_have_ended_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    now = 1_000_000.0
    assert abandoned_locks(now) == []
    younger, older = lock(tmp_path / "cpu_adam", 700, now), lock(tmp_path / "py311_cpu" / "shm", 9000, now)
    working = lock(tmp_path / "async_io", 9000, now)
    os.utime(working.parent / "part.o", (now - 5, now - 5))
    assert abandoned_locks(now) == [older, younger]
    assert working.exists()


def devices(*indices):
    return [torch.device("cuda", index) for index in indices]


def test_the_first_devices_are_addressed_and_others_are_not():
    check_first_devices(devices(0, 1, 2), "CUDA_VISIBLE_DEVICES")
    check_first_devices([torch.device("cpu")] * 2, "CUDA_VISIBLE_DEVICES")
    for wrong in ([1], [2, 3], [1, 0]):
        with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=" + ",".join(map(str, wrong))):
            check_first_devices(devices(*wrong), "CUDA_VISIBLE_DEVICES")


def test_the_folder_of_extensions_is_torchs(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for caches in (None, str(tmp_path)):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if caches is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", caches)
        assert extension_folder() == Path(get_default_build_root())
