"""The strategy's arguments put into the user's configuration; where both speak, they have to say the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fabric_core.errors import InvalidArgumentError
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.warnings import user_stacklevel
from fabric_deepspeed.config.keywords import DEFAULTS, FLOAT16_PATHS, PATHS, SWITCHES, Path
from fabric_deepspeed.config.tree import AUTO, lookup, put, remove, stated

_ALL: Final = {**PATHS, **FLOAT16_PATHS}


def values_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that would say what the configuration says, as far as it says anything."""
    says: dict[str, Any] = {}
    for name, paths in _ALL.items():
        values = [value for path in paths if (value := stated(document, path)) not in (None, "none")]
        if values:
            says[name] = values[0]
    if "stage" in says:
        says["zero_optimization"] = says["stage"] != 0
    for name in ("offload_optimizer", "offload_parameters"):
        device = stated(document, SWITCHES[name][0])
        if device is not None:
            says[name] = device != "none"
    return says


def check_contradictions(
    document: Mapping[str, Any], keywords: Mapping[str, Any], typed: Iterable[str], source: str
) -> None:
    """``InvalidArgumentError`` for the first argument that was typed and that the configuration contradicts."""
    says = values_of(document)
    for name in sorted(typed):
        if name in SWITCHES and name in says and says[name] != bool(keywords[name]):
            path = SWITCHES[name][0]
            raise _contradiction(name, keywords[name], path, lookup(document, path), source)
        for path in _ALL.get(name, ()):
            value = stated(document, path)
            if value not in (None, "none") and not _same(value, keywords[name]):
                raise _contradiction(name, keywords[name], path, value, source)


def _contradiction(name: str, asked: Any, path: Path, value: Any, source: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name}={asked!r} was asked for, by an argument or by the strategy's name, but {source} says "
        f"{'.'.join(path)}={value!r}. Leave the argument out, or change the configuration."
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, os.PathLike):
        other = os.fspath(other)
    return bool(one == other)


def fill(document: dict[str, Any], wanted: Mapping[str, Any], typed: Iterable[str]) -> None:
    """Take from ``wanted`` what the arguments typed stand for, where the document says nothing."""
    for name in typed:
        for path in (*SWITCHES.get(name, ()), *_ALL.get(name, ())):
            value = lookup(wanted, path)
            if value is not None and stated(document, path) is None:
                put(document, path, value)


def fill_autos(document: dict[str, Any], wanted: Mapping[str, Any], paths: Iterable[Path]) -> None:
    """Replace ``"auto"`` at these paths by what ``wanted`` says; where it says nothing, DeepSpeed's default holds."""
    for path in paths:
        if lookup(document, path) != AUTO:
            continue
        value = lookup(wanted, path)
        if value is None:
            remove(document, path)
        else:
            put(document, path, value)


def warn_without_effect(wanted: Mapping[str, Any], keywords: Mapping[str, Any], typed: Iterable[str], why: str) -> None:
    """Warn on rank 0 about arguments typed that ``wanted`` has no place for."""
    idle = sorted(
        name
        for name in typed
        if name in _ALL
        and keywords[name] != DEFAULTS[name]
        and all(lookup(wanted, path) is None for path in _ALL[name])
    )
    if idle:
        listing = ", ".join(f"{name}={keywords[name]!r}" for name in idle)
        rank_zero_warn(f"{listing}: no effect {why}.", stacklevel=user_stacklevel("fabric_deepspeed"))
