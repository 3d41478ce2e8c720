"""Facts for a bug report, told without importing what they are about."""

import os
import subprocess
import sys

from fabric_core.registry import get_registry
from fabric_deepspeed.backend import load

LIGHT = """
import sys
from fabric_deepspeed.hooks import fabric_environment_report
report = fabric_environment_report()
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
print(report["deepspeed accelerator"])
"""


def report():
    (found,) = [one for one in get_registry().hooks.fabric_environment_report() if "deepspeed" in one]
    return found


def test_it_tells_the_release_and_where_native_parts_are_built(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = report()
    assert found["deepspeed"].split(".")[0].isdigit()
    assert found["deepspeed extensions"] == str(tmp_path)
    assert found["deepspeed abandoned locks"] == []


def test_it_imports_neither_torch_nor_deepspeed(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "not imported yet"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cpu, by DS_ACCELERATOR"


def test_it_names_the_locks_of_builds_that_were_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert report()["deepspeed abandoned locks"] == []  # it may be at work
    os.utime(lock, (0, 0))
    assert report()["deepspeed abandoned locks"] == [str(lock)]


def of_workers():
    load("cpu")
    return report()["deepspeed accelerator"]


def test_it_names_the_devices_that_deepspeed_works_on(workers):
    assert workers(2).run(of_workers) == ["cpu"] * 2
