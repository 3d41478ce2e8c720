"""The source of the packages, read as text and as a tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {path.name: path for path in sorted(ROOT.glob("packages/*/src/fabric_*"))}
CORE = PACKAGES["fabric_core"]


@dataclass(frozen=True)
class Source:
    """One module."""

    path: Path
    package: Path = CORE

    @property
    def name(self) -> str:
        """Where it is in the package, as in ``registry/known.py``; with the package's name if that is not core."""
        return self.path.relative_to(self.package if self.package == CORE else self.package.parent).as_posix()

    @property
    def module(self) -> str:
        """Its dotted name."""
        parts = self.path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imports(self) -> Iterator[str]:
        """Dotted names of all modules it imports, late ones included; ``from a import b`` counts as ``a.b``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(package: str = "fabric_core") -> list[Source]:
    """Every module of a package."""
    folder = PACKAGES[package]
    return [Source(path, folder) for path in sorted(folder.rglob("*.py"))]


def plugin_sources() -> list[Source]:
    """Every module of the packages that are plugins."""
    return [source for package in PACKAGES if package != "fabric_core" for source in sources(package)]
