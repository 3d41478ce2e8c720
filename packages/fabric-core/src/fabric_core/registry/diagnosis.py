"""What a user should know about the plugins that are installed, without importing one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fabric_core.registry.ref import PluginRef


@dataclass(frozen=True)
class Finding:
    """Something about one plugin or distribution.

    Attributes:
        severity: an ``error`` cannot be used at all; a ``warning`` can be, if spelled otherwise; a ``note`` is wanted.
        subject: the plugin or the distribution.
        message: what there is to know.
        fix: what to do about it; empty for notes.
    """

    severity: Literal["error", "warning", "note"]
    subject: str
    message: str
    fix: str = ""


def diagnose(
    refs: Iterable[PluginRef], damaged: Iterable[tuple[str, str]], failures: Mapping[str, BaseException]
) -> list[Finding]:
    """One finding for each reference that is not ``ok``, each damaged distribution and each failed hook module."""
    return [
        *(
            Finding("error", dist, f"its metadata cannot be read: {reason}", "install it again")
            for dist, reason in damaged
        ),
        *(
            Finding("error", origin, f"its hooks cannot be loaded: {type(error).__name__}: {error}", "upgrade it")
            for origin, error in failures.items()
        ),
        *(finding for ref in refs if ref.status != "ok" for finding in [_of_ref(ref)]),
    ]


def _of_ref(ref: PluginRef) -> Finding:
    if ref.status == "incompatible":
        return Finding("error", str(ref), ref.reason, f"pip install --upgrade {ref.dist}")
    if ref.status == "blocked":
        return Finding("note", str(ref), ref.reason)
    return Finding("warning", str(ref), ref.reason, f'pass "{ref.qualified}" to choose it')
