"""A stranger's plugin, built as a wheel and installed without the workspace, is chosen by its name.

The clean environment holds what real wheels of core and of the plugins put there, installed by pip, offline. Only what
core depends on, torch above all, is taken from the surrounding environment, through a ``.pth`` file: a folder added in
that way comes last, and its own ``.pth`` files are ignored, so the workspace's editable install is out of reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "packages" / "fabric-core"
PYPROJECT = """
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"

    [project]
    name = "fabric-{name}"
    version = "0.3"
    dependencies = ["fabric-core>=0.1"]

    [project.entry-points."fabric.strategies"]
    {name} = "fabric_{module}.strategy:{class_name}"

    [project.entry-points."fabric.hooks"]
    {name} = "fabric_{module}.hooks"
"""
STRATEGY = """
    from fabric_core.strategies import SingleDeviceStrategy

    class MyStrategy(SingleDeviceStrategy):
        backwards = 0

        def backward(self, tensor, module, *args, **kwargs):
            self.backwards += 1
            super().backward(tensor, module, *args, **kwargs)
"""
HOOKS = """
    from fabric_core.abc.hooks import hookimpl

    @hookimpl
    def fabric_on_setup(fabric, module):
        from fabric_core import is_wrapped

        fabric.set_up = is_wrapped(module)
"""
TRAIN = """
    import json, sys, warnings
    import torch
    import fabric_core
    from fabric_core import Fabric

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric = Fabric(accelerator="cpu", devices=1, strategy=sys.argv[1])
    fabric.launch()
    model = torch.nn.Linear(8, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    losses = []
    for _ in range(5):
        loss = (model(torch.ones(4, 8)) - 3).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    print(json.dumps({
        "core": fabric_core.__file__,
        "strategy": type(fabric.strategy).__name__,
        "backwards": getattr(fabric.strategy, "backwards", None),
        "set_up": getattr(fabric, "set_up", None),
        "learned": losses[-1] < losses[0],
        "warnings": [str(one.message) for one in caught],
    }))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment with packages of its own."""

    root: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        # -P would also keep the script's folder away, but needs Python 3.11; it holds nothing that could be imported.
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        python = self.root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        return subprocess.run([python, *words], env=clean, capture_output=True, text=True, check=False, timeout=170)

    def train(self, strategy: str) -> dict[str, object]:
        done = self.run(str(self.root / "train.py"), strategy)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def project(path: Path, name: str, class_name: str, **modules: str) -> Path:
    """Write a plugin project of a few lines."""
    module = name.replace("-", "_")
    package = path / f"fabric_{module}"
    package.mkdir(parents=True)
    (path / "pyproject.toml").write_text(
        textwrap.dedent(PYPROJECT).format(name=name, module=module, class_name=class_name)
    )
    for file, source in {"__init__": "", **modules}.items():
        (package / f"{file}.py").write_text(textwrap.dedent(source))
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Holds core, a plugin that works, and one whose every module fails."""
    root = tmp_path_factory.mktemp("third_party")
    good = project(root / "good", "my-plugin", "MyStrategy", strategy=STRATEGY, hooks=HOOKS)
    broken = "import no_such_backend"
    bad = project(root / "bad", "broken", "Broken", strategy=broken, hooks=broken)
    for source in (CORE, good, bad):
        build = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(root / "wheels"),
            str(source),
        ]
        subprocess.run(build, check=True, capture_output=True)

    made = Environment(root / "env")
    subprocess.run([sys.executable, "-m", "venv", str(made.root)], check=True)
    wheels = map(str, (root / "wheels").glob("*.whl"))
    installed = made.run("-m", "pip", "install", "--no-index", "--no-deps", "--quiet", *wheels)
    assert installed.returncode == 0, installed.stderr
    own = made.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    paths = sysconfig.get_paths()
    (Path(own) / "dependencies.pth").write_text("\n".join({paths["purelib"], paths["platlib"]}))
    (made.root / "train.py").write_text(textwrap.dedent(TRAIN))
    return made


@pytest.mark.parametrize("name", ["my-plugin", "fabric-my-plugin::My_Plugin"])
def test_it_trains_with_the_strategy_of_that_name(environment: Environment, name: str) -> None:
    result = environment.train(name)
    assert (result["strategy"], result["backwards"], result["set_up"]) == ("MyStrategy", 5, True)
    assert result["learned"]
    assert str(result["core"]).startswith(str(environment.root)), "core must come from its wheel, not the workspace"


@pytest.mark.parametrize("name", ["auto", "ddp"])
def test_a_broken_plugin_leaves_everybody_else_alone(environment: Environment, name: str) -> None:
    result = environment.train(name)
    assert result["learned"]
    assert [text for text in result["warnings"] if "broken" in text] == [
        "the hooks of fabric-broken 0.3 are not used: ModuleNotFoundError: No module named 'no_such_backend'"
    ]


def test_choosing_the_broken_plugin_names_its_distribution(environment: Environment) -> None:
    done = environment.run(str(environment.root / "train.py"), "broken")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_backend'" in done.stderr
    assert "PluginLoadError: strategy 'broken' of fabric-broken 0.3 is found, but importing" in done.stderr


def test_the_console_script_lists_both(environment: Environment) -> None:
    done = environment.run("-m", "fabric_core", "plugins", "list", "--kind", "strategy")
    assert {"my-plugin", "broken"} <= {line.split()[1] for line in done.stdout.splitlines()}
