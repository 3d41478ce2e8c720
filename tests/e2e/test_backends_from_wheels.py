"""The backends' wheels, in clean environments: chosen by name they train, unchosen they cost nothing."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from e2e.wheel_environment import Done, Environment

pytestmark = pytest.mark.timeout(900)  # the first run may build native parts
pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")

TRAIN = """
    import json, sys
    import torch
    import fabric_core
    from fabric_core import Fabric

    fabric = Fabric()
    fabric.launch()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model[1].parameters(), lr=0.1))
    losses = []
    for _ in range(5):
        loss = (model(torch.ones(4, 64, device=fabric.device)) - 3).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    if fabric.is_global_zero:
        print(json.dumps({
            "files": [fabric_core.__file__, sys.modules[sys.argv[1]].__file__],
            "strategy": type(fabric.strategy).__name__,
            "precision": type(fabric.strategy.precision).__name__,
            "layers": [type(layer).__name__ for layer in model.modules()],
            "world_size": fabric.world_size,
            "learned": losses[-1] < losses[0],
        }))
"""
HEAVY = ("deepspeed", "bitsandbytes", "fabric_deepspeed.strategy", "fabric_bnb.precision")
TELL_IMPORTED = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def train(environment: Environment, *options: str, plugin: str = "fabric_core", **variables: str) -> Done:
    program = environment.root / "train.py"
    program.write_text(textwrap.dedent(TRAIN))
    return environment.fabric("run", "--accelerator", "cpu", *options, str(program), plugin, **variables)


def result(done: Done) -> Any:
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A folder for PYTHONPATH in which both backends fail as they do where a native library does not fit."""
    for name in ("deepspeed", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text(f"raise OSError('lib{name}.so: undefined symbol: _ZN3c10')\n")
    return str(tmp_path)


def test_the_names_of_both_are_listed_and_nothing_is_imported_for_it(backends: Environment) -> None:
    command = "from fabric_core.cli.main import cli; cli(['plugins', 'list', '--json'], standalone_mode=False)"
    done = backends.script(command, TELL_IMPORTED)
    assert result(done) == []
    listed = json.loads(done.stdout.rpartition("\n[")[0])
    found = {(one["dist"], one["kind"], one["name"]) for one in listed}
    stages = ("1", "1_offload", "2", "2_offload", "3", "3_offload", "3_offload_nvme")
    names = ["deepspeed", *(f"deepspeed_stage_{one}" for one in stages)]
    assert {("fabric-deepspeed", "strategy", name) for name in names} <= found
    assert ("fabric-bnb", "precision", "bnb-nf4") in found


def test_deepspeed_trains_in_two_processes(backends: Environment) -> None:
    seen = result(train(backends, "--devices", "2", "--strategy", "deepspeed_stage_2", plugin="fabric_deepspeed"))
    assert (seen["strategy"], seen["precision"]) == ("DeepSpeedStrategy", "DeepSpeedPrecision")
    assert (seen["world_size"], seen["learned"]) == (2, True)
    assert all(file.startswith(str(backends.root)) for file in seen["files"]), "not from the wheels"


def test_bitsandbytes_trains(backends: Environment) -> None:
    seen = result(train(backends, "--devices", "1", "--precision", "bnb-nf4", plugin="fabric_bnb"))
    assert (seen["precision"], seen["learned"]) == ("BitsandbytesPrecision", True)
    assert "Linear" not in seen["layers"], "the linear layer is there, unquantised"
    assert all(file.startswith(str(backends.root)) for file in seen["files"]), "not from the wheels"


@pytest.mark.parametrize(
    "program",
    [
        "import fabric_core",
        "from fabric_core import Fabric; Fabric(accelerator='cpu', devices=1)",
        "from fabric_core import Fabric; Fabric(accelerator='cpu', devices=2, strategy='ddp')",
        "from fabric_core.registry import get_registry; get_registry().names('strategy')",
        "import fabric_deepspeed, fabric_deepspeed.presets, fabric_bnb",
    ],
    ids=["import", "auto", "ddp", "names", "packages"],
)
def test_who_does_not_choose_them_does_not_import_them(backends: Environment, program: str) -> None:
    assert result(backends.script(program, TELL_IMPORTED)) == []


@pytest.mark.parametrize("argument", ["strategy='deepspeed'", "strategy='deepspeed_stage_3'", "precision='bnb-nf4'"])
def test_uninstalled_it_says_what_to_install(core_alone: Environment, argument: str) -> None:
    done = core_alone.script(f"from fabric_core import Fabric; Fabric(accelerator='cpu', {argument})")
    wanted = "fabric-deepspeed" if "deepspeed" in argument else "fabric-bnb"
    assert done.returncode == 1
    assert f"pip install {wanted}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("strategies", "DeepSpeedStrategy", "deepspeed"), ("plugins", "BitsandbytesPrecision", "bnb")],
)
def test_uninstalled_its_class_says_so_too(core_alone: Environment, module: str, name: str, package: str) -> None:
    done = core_alone.script(f"from fabric_core.{module} import {name}; {name}('nf4')")
    assert done.returncode == 1
    assert f"pip install fabric-{package}" in done.stderr


def test_broken_they_leave_everybody_else_alone(backends: Environment, broken: str) -> None:
    done = train(backends, "--devices", "2", "--strategy", "auto", PYTHONPATH=broken)
    assert result(done)["learned"]
    assert "undefined symbol" not in done.stderr


CHOICES = {"deepspeed": ("--strategy", "deepspeed_stage_1"), "bitsandbytes": ("--precision", "bnb-int8")}


@pytest.mark.parametrize("package", CHOICES)
def test_broken_it_fails_for_who_chooses_it_and_says_why(backends: Environment, broken: str, package: str) -> None:
    done = train(backends, "--devices", "1", *CHOICES[package], PYTHONPATH=broken)
    assert done.returncode == 1
    assert f"lib{package}.so: undefined symbol: _ZN3c10" in done.stderr
    assert "PluginLoadError: " in done.stderr
    assert "importing it" in done.stderr


def test_deepspeed_trains_on_cpus_without_a_compiler(backends: Environment, tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = train(backends, "--devices", "1", *CHOICES["deepspeed"], **nothing)
    assert done.returncode == 0, done.stderr
