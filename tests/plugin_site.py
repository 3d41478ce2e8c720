"""Hand-written installed distributions: real metadata in a real folder on ``sys.path``, no installer and no mocks."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

Entries = dict[str, dict[str, str]]


class PluginSite:
    """A folder of packages, as ``site-packages`` is one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)

    def dist(self, name: str, entries: Entries, version: str = "1.0", requires: Iterable[str] = ()) -> Path:
        """Install the metadata of a distribution; ``entries`` by group and name."""
        folder = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        facts = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *facts, ""]))
        lines = [
            line
            for group, points in entries.items()
            for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
        ]
        (folder / "entry_points.txt").write_text("\n".join([*lines, ""]))
        return folder

    def module(self, name: str, source: str) -> None:
        """Install a module."""
        (self.path / f"{name}.py").write_text(textwrap.dedent(source))

    def strategy(self, dist: str, name: str, version: str = "1.0", requires: Iterable[str] = ()) -> str:
        """Install a distribution with one strategy, a plain class that knows where it came from. Returns its module."""
        module = dist.replace("-", "_")
        self.module(module, f"class Made:\n    origin = {dist!r}\n")
        self.dist(dist, {"fabric.strategies": {name: f"{module}:Made"}}, version, requires)
        return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginSite]:
    """A folder of packages at the front of the path; what was imported from it is forgotten afterwards."""
    made = PluginSite(tmp_path / "site")
    for variable in ("DISABLE_PLUGIN_AUTOLOAD", "PLUGINS", "PLUGINS_BLOCK", "PLUGINS_PREFER", "PLUGINS_STRICT"):
        monkeypatch.delenv(f"FABRIC_{variable}", raising=False)
    monkeypatch.syspath_prepend(str(made.path))
    before = set(sys.modules)
    yield made
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(made.path)):
            del sys.modules[name]
