"""The rules for every file of core, and some for every package. Each test lists who breaks its rule, by file."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from fabric_core.settings import declared

from .source import ROOT, Source, plugin_sources, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCES = sources()
EVERYWHERE = [*SOURCES, *plugin_sources()]
BACKENDS = re.compile("deepspeed|xla|bitsandbytes|bnb", re.IGNORECASE)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ENVIRONMENT = {"environ", "getenv", "putenv", "unsetenv"}


def offenders(
    rule: Callable[[Source], Iterable[object]], *, but: tuple[str, ...] = (), among: list[Source] = SOURCES
) -> dict[str, list[object]]:
    """File to what the rule finds in it, without files that comply and those excepted."""
    found = {source.name: list(rule(source)) for source in among if source.name not in but}
    return {name: offences for name, offences in found.items() if offences}


def functions(source: Source) -> Iterator[tuple[str, int]]:
    """Name and length of every function."""
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def test_core_is_read_at_all() -> None:
    assert {"settings.py", "registry/known.py", "registry/metadata.py"} <= {source.name for source in SOURCES}


def test_an_import_goes_down_never_up() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(one for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    heights = {
        name: height for height, line in enumerate(contract["layers"][::-1]) for name in re.split(r"\s*[|:]\s*", line)
    }

    def height(module: str) -> int | None:
        return next((h for name, h in heights.items() if f"{module}.".startswith(f"{name}.")), None)

    def upward(source: Source) -> list[str]:
        here = height(source.module)
        return [name for name in source.imports() if here is not None and (height(name) or 0) > here]

    assert offenders(upward) == {}


def test_backends_are_named_in_one_file_only() -> None:
    assert offenders(lambda source: BACKENDS.findall(source.text), but=("registry/known.py",)) == {}


def test_nothing_is_compared_with_cuda() -> None:
    """What a device can do is asked of its accelerator; then one that nobody thought of works too."""

    def compares(source: Source) -> Iterator[str]:
        for node in ast.walk(source.tree):
            parts = ast.walk(node) if isinstance(node, (ast.Compare, ast.match_case)) else ()
            if any(isinstance(part, ast.Constant) and part.value == "cuda" for part in parts):
                yield ast.unparse(node)

    assert offenders(compares) == {}


def test_environment_variables_are_named_in_settings_only() -> None:
    variables = set(declared())

    def names(source: Source) -> set[object]:
        return {node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant)} & variables

    assert offenders(names, but=("settings.py",)) == {}


def test_the_environment_is_touched_through_settings_only() -> None:
    def touches(source: Source) -> list[str]:
        nodes = (node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute))
        return [ast.unparse(node) for node in nodes if node.attr in ENVIRONMENT]

    # The isolation fixture puts back whatever a test did to the environment, declared or not.
    assert offenders(touches, but=("settings.py", "testing/isolation.py"), among=EVERYWHERE) == {}


def test_metadata_of_distributions_is_read_in_one_file_only() -> None:
    def reads(source: Source) -> list[str]:
        return [name for name in source.imports() if name.startswith(("importlib.metadata", "importlib_metadata"))]

    assert offenders(reads, but=("registry/metadata.py",)) == {}


def test_only_tests_import_the_testing_package() -> None:
    def imports(source: Source) -> list[str]:
        outside = not source.name.startswith("testing/")
        return [name for name in source.imports() if outside and name.startswith("fabric_core.testing")]

    assert offenders(imports) == {}


def test_core_imports_only_what_it_declares() -> None:
    packages = {"torch", "pluggy", "click", "packaging", "importlib_metadata", "fabric_core", *sys.stdlib_module_names}
    optional = {"fsspec", "numpy", "pytest"}  # a remote path, an array of the user's, the fixtures for plugin authors

    def foreign(source: Source) -> set[str]:
        return {name.partition(".")[0] for name in source.imports()} - packages - optional

    assert offenders(foreign) == {}


def test_files_are_under_400_lines_and_functions_under_50() -> None:
    assert offenders(lambda source: [n for n in [len(source.text.splitlines())] if n >= 400], among=EVERYWHERE) == {}
    long = offenders(lambda source: [name for name, length in functions(source) if length >= 50], among=EVERYWHERE)
    assert long == {}


def test_ninety_nine_of_a_hundred_functions_are_under_40_lines() -> None:
    lengths = sorted(length for source in EVERYWHERE for _, length in functions(source))
    assert lengths[int(len(lengths) * 0.99)] < 40


def test_no_file_is_a_drawer() -> None:
    assert not {"utils", "util", "misc", "helpers", "common"} & {source.path.stem for source in EVERYWHERE}
