"""What holds for the packages that are plugins: they are built on the public core, and cost nothing until chosen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from .source import PACKAGES, ROOT, Source, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLUGINS = [name for name in PACKAGES if name != "fabric_core"]
BACKENDS = {"fabric_bnb": {"bitsandbytes"}, "fabric_deepspeed": {"deepspeed"}}


def project(package: str) -> dict:
    folder = ROOT / "packages" / package.replace("_", "-")
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def private(source: Source) -> Iterator[str]:
    """Names of core with a leading underscore that a module imports."""
    for name in source.imports():
        first, *parts = name.split(".")
        if first == "fabric_core" and any(part.startswith("_") for part in parts):
            yield name


@pytest.mark.parametrize("package", PLUGINS)
class TestPluginPackage:
    def test_it_imports_what_is_public_in_core_alone(self, package):
        assert {source.name: found for source in sources(package) if (found := list(private(source)))} == {}

    def test_it_imports_what_it_declares_alone(self, package):
        allowed = {"torch", "fabric_core", "packaging", package, *BACKENDS[package], *sys.stdlib_module_names}
        foreign = {name.partition(".")[0] for source in sources(package) for name in source.imports()} - allowed
        assert foreign == set()

    def test_it_says_which_core_it_fits(self, package):
        assert "fabric-core>=0.1,<0.2" in project(package)["dependencies"]

    def test_it_does_not_cap_torch(self, package):
        assert [one for one in project(package)["dependencies"] if one.startswith("torch")] == []

    @pytest.mark.parametrize("module", ["", ".hooks"])
    def test_what_is_loaded_before_anything_is_chosen_imports_neither_torch_nor_the_backend(self, package, module):
        heavy = {"torch", *BACKENDS[package]}
        code = f"import sys, {package}{module}; print(sorted({heavy!r} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "[]\n"
