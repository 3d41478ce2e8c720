"""The backends' wheels, in clean environments: chosen by name they train, unchosen they cost nothing.

An environment holds wheels of this workspace. What they depend on is taken from the surrounding environment, through a
``.pth`` file, so no network is needed, and the workspace's editable installs, which are ``.pth`` files too, are out of
reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # the first run may build native parts, and must not be killed meanwhile
pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")

PACKAGES = Path(__file__).parents[2] / "packages"
BACKENDS = ("fabric-bnb", "fabric-deepspeed")
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
            "files": [fabric_core.__file__, sys.modules[PLUGIN].__file__],
            "strategy": type(fabric.strategy).__name__,
            "precision": type(fabric.strategy.precision).__name__,
            "layers": [type(layer).__name__ for layer in model.modules()],
            "world_size": fabric.world_size,
            "learned": losses[-1] < losses[0],
        }))
"""
HEAVY = ("deepspeed", "bitsandbytes", "fabric_deepspeed.strategy", "fabric_bnb.precision")
TELL_IMPORTED = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


@dataclass(frozen=True)
class Environment:
    """A Python environment with packages of its own."""

    root: Path

    @property
    def python(self) -> str:
        return str(self.root / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        clean |= {"OMP_NUM_THREADS": "1"} | variables
        return subprocess.run([self.python, *words], env=clean, capture_output=True, text=True, check=False)

    def script(self, *lines: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", "\n".join(lines))

    def fabric_run(self, *options: str, plugin: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = self.root / "train.py"
        program.write_text(textwrap.dedent(TRAIN).replace("PLUGIN", repr(plugin)))
        return self.run("-m", "fabric_core", "run", "--accelerator", "cpu", *options, str(program), **variables)


def surroundings() -> list[Path]:
    """The folders from which the wheels' dependencies are taken."""
    return [Path(path) for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]


def without_backends(folder: Path) -> list[Path]:
    """Make a folder of links to the same, but to no backend."""
    folder.mkdir()
    hidden = ("fabric_", "_editable_impl_", "__editable__", "deepspeed", "bitsandbytes")
    for entry in (entry for site in surroundings() for entry in site.iterdir()):
        if not entry.name.startswith(hidden):
            (folder / entry.name).symlink_to(entry)
    return [folder]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    sources = [str(PACKAGES / name) for name in ("fabric-core", *BACKENDS)]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), *sources], check=True, capture_output=True)
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in folder.glob("*.whl")}


def make_environment(root: Path, wheels: Iterable[Path], dependencies: Iterable[Path]) -> Environment:
    made = Environment(root / "env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made.root)], check=True)
    install = [sys.executable, "-m", "pip", "--python", made.python, "install", "--no-index", "--no-deps", "--quiet"]
    subprocess.run([*install, *map(str, wheels)], check=True, capture_output=True)
    own = made.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(own) / "dependencies.pth").write_text("\n".join(map(str, dependencies)))
    return made


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """Core and both backends, as wheels."""
    return make_environment(tmp_path_factory.mktemp("backends"), wheels.values(), surroundings())


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """Core as a wheel, and no backend."""
    root = tmp_path_factory.mktemp("core_alone")
    return make_environment(root, [wheels["fabric-core"]], without_backends(root / "dependencies"))


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A folder for PYTHONPATH in which both backends fail as they do where a native library does not fit."""
    for name in ("deepspeed", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text(f"raise OSError('lib{name}.so: undefined symbol: _ZN3c10')\n")
    return str(tmp_path)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def test_the_names_of_both_are_listed_and_nothing_is_imported_for_it(backends: Environment) -> None:
    command = "from fabric_core.cli.main import cli; cli(['plugins', 'list', '--json'], standalone_mode=False)"
    done = backends.script(command, TELL_IMPORTED)
    assert result(done) == []
    listed = done.stdout.rpartition("\n[")[0]
    found = {(one["kind"], one["name"]) for one in json.loads(listed) if one["dist"] in BACKENDS}
    stages = ("1", "1_offload", "2", "2_offload", "3", "3_offload", "3_offload_nvme")
    assert {("strategy", "deepspeed"), *(("strategy", f"deepspeed_stage_{one}") for one in stages)} <= found
    assert ("precision", "bnb-nf4") in found


def test_deepspeed_trains_in_two_processes(backends: Environment) -> None:
    done = backends.fabric_run("--devices", "2", "--strategy", "deepspeed_stage_2", plugin="fabric_deepspeed")
    seen = result(done)
    assert (seen["strategy"], seen["precision"]) == ("DeepSpeedStrategy", "DeepSpeedPrecision")
    assert (seen["world_size"], seen["learned"]) == (2, True)
    assert all(file.startswith(str(backends.root)) for file in seen["files"]), "not from the wheels"


def test_bitsandbytes_trains(backends: Environment) -> None:
    seen = result(backends.fabric_run("--devices", "1", "--precision", "bnb-nf4", plugin="fabric_bnb"))
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
        "import fabric_deepspeed, fabric_bnb, fabric_deepspeed.presets",
    ],
    ids=["import", "auto", "ddp", "names", "the packages"],
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
    ("name", "package"), [("strategies.DeepSpeedStrategy", "deepspeed"), ("plugins.BitsandbytesPrecision", "bnb")]
)
def test_uninstalled_its_class_says_so_too(core_alone: Environment, name: str, package: str) -> None:
    module, _, attribute = name.rpartition(".")
    done = core_alone.script(f"from fabric_core.{module} import {attribute}; {attribute}('nf4')")
    assert done.returncode == 1
    assert f"pip install fabric-{package}" in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_broken_they_leave_everybody_else_alone(backends: Environment, broken: str, strategy: str) -> None:
    done = backends.fabric_run("--devices", "1", "--strategy", strategy, plugin="json", PYTHONPATH=broken)
    assert result(done)["learned"]
    assert "undefined symbol" not in done.stderr


CHOICES = {
    "deepspeed": ("--strategy", "deepspeed_stage_1"),
    "bitsandbytes": ("--precision", "bnb-int8"),
}


@pytest.mark.parametrize("package", CHOICES)
def test_broken_it_fails_for_who_chooses_it_and_says_why(backends: Environment, broken: str, package: str) -> None:
    done = backends.fabric_run("--devices", "1", *CHOICES[package], plugin="json", PYTHONPATH=broken)
    assert done.returncode == 1
    assert "undefined symbol: _ZN3c10" in done.stderr
    assert "PluginLoadError: " in done.stderr
    assert "importing it" in done.stderr
