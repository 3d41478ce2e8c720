"""Whether a plugin and this core fit together: by version before the import, by contract level after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from fabric_core.abc import API_LEVEL
from fabric_core.errors import IncompatiblePluginError
from fabric_core.registry.ref import CORE, PluginRef, dist_key

CORE_VERSION: Final = "0.1.0"
"""The version of this core. In code, because a frozen application has no metadata and a look-up costs a scan."""


def version_problem(dist: str, version: str, requires_core: Iterable[str], minimum: Mapping[str, str]) -> str:
    """Why the distribution cannot be used with this core, in words; empty if nothing speaks against it."""
    for requirement in requires_core:
        problem = _requirement_problem(requirement)
        if problem:
            return problem
    oldest = minimum.get(dist_key(dist))
    return "" if oldest is None else _age_problem(dist, version, oldest)


def check_level(target: object, ref: PluginRef) -> None:
    """``IncompatiblePluginError`` if the target declares another contract level than this core has.

    A classmethod answers with its class; a plain function may carry ``fabric_api`` itself or say nothing.
    """
    owner = getattr(target, "__self__", target)
    level = getattr(owner, "fabric_api", None)
    if level is not None and str(level) != API_LEVEL:
        raise IncompatiblePluginError(
            f"{ref} is written for contract level {level}, {CORE} {CORE_VERSION} has level {API_LEVEL}. "
            f"Install versions that fit: pip install --upgrade {CORE} {ref.dist}".rstrip()
        )


def _requirement_problem(text: str) -> str:
    # Imported here: it costs some 10 ms, and most plugins of a kind are never looked at.
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return f"its requirement {text!r} cannot be read"
    if dist_key(requirement.name) != CORE or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        return ""
    if requirement.specifier.contains(CORE_VERSION, prereleases=True):
        return ""
    return f"it needs {CORE}{requirement.specifier}, this is {CORE_VERSION}"


def _age_problem(dist: str, version: str, oldest: str) -> str:
    from packaging.version import InvalidVersion, Version

    try:
        too_old = Version(version) < Version(oldest)
    except InvalidVersion:
        return f"its version {version!r} cannot be read"
    return f"{CORE} {CORE_VERSION} needs {dist}>={oldest}, this is {version}" if too_old else ""
