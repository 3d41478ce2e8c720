"""Clean environments that hold wheels of this workspace.

What the wheels depend on is taken from the surrounding environment, through a ``.pth`` file: no network is needed, and
the workspace's editable installs, which are ``.pth`` files too, are out of reach.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = Path(__file__).parents[2] / "packages"
Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Environment:
    """A Python environment with packages of its own."""

    root: Path

    @property
    def python(self) -> str:
        return str(self.root / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))

    def run(self, *words: str, **variables: str) -> Done:
        """Run Python with these arguments, to the end: a build of native parts must not be killed."""
        ours = ("LT_", "FABRIC_", "PL_", "PYTHONPATH")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        clean |= {"OMP_NUM_THREADS": "1"} | variables
        return subprocess.run([self.python, *words], env=clean, capture_output=True, text=True, check=False)

    def script(self, *lines: str) -> Done:
        return self.run("-c", "\n".join(lines))

    def fabric(self, *words: str, **variables: str) -> Done:
        return self.run("-m", "fabric_core", *words, **variables)


def build_wheels(folder: Path, *names: str) -> dict[str, Path]:
    """Build the packages of these names; return the wheel of each."""
    for name in names:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
        subprocess.run([*build, str(PACKAGES / name)], check=True, capture_output=True)
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in folder.glob("*.whl")}


def make_environment(root: Path, wheels: Iterable[Path], dependencies: Iterable[Path]) -> Environment:
    made = Environment(root / "env")
    subprocess.run([sys.executable, "-m", "venv", str(made.root)], check=True)
    installed = made.run("-m", "pip", "install", "--no-index", "--no-deps", "--quiet", *map(str, wheels))
    assert installed.returncode == 0, installed.stderr
    own = made.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(own) / "dependencies.pth").write_text("\n".join(map(str, dependencies)))
    return made


def surroundings() -> list[Path]:
    """The folders that hold what is installed here."""
    return [Path(path) for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]


def without_backends(folder: Path) -> list[Path]:
    """Make a folder of links to the same, but to no backend."""
    folder.mkdir()
    hidden = ("fabric_", "_editable_impl_", "__editable__", "deepspeed", "bitsandbytes")
    for entry in (entry for site in surroundings() for entry in site.iterdir()):
        if not entry.name.startswith(hidden):
            (folder / entry.name).symlink_to(entry)
    return [folder]
