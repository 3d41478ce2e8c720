"""Makes sure that every rank uses the same plugins: one that differs in version corrupts a job late and quietly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from fabric_core.errors import IncompatiblePluginError
from fabric_core.registry.contract import CORE_VERSION
from fabric_core.registry.discovery import Discovery
from fabric_core.registry.ref import CORE, GROUPS, PluginRef, dist_key, name_key


def fingerprint(refs: Iterable[PluginRef], discovery: Discovery) -> tuple[str, ...]:
    """What stands behind each reference on this machine; equal on two machines exactly if it is the same."""
    return (f"{CORE} {CORE_VERSION}", *(_line(ref, discovery) for ref in refs))


def check_same(rank: int, here: Sequence[str], first: Sequence[str]) -> None:
    """``IncompatiblePluginError`` naming rank, distribution and versions if ``here`` is not rank 0's fingerprint."""
    for mine, other in zip_longest(here, first, fillvalue="nothing"):
        if mine != other:
            raise IncompatiblePluginError(
                f"rank {rank} has {mine}, rank 0 has {other}: give the same arguments and install the same versions "
                "on every machine."
            )


def _line(ref: PluginRef, discovery: Discovery) -> str:
    label = f"{ref.kind} {ref.name!r}"
    if not ref.dist:
        return f"{label} from {ref.value}"
    if dist_key(ref.dist) == CORE:
        return f"{label} from {CORE} {CORE_VERSION} ({ref.value})"
    for entry in discovery.entries_of(ref.dist):
        if entry.group == GROUPS[ref.kind] and name_key(entry.name) == name_key(ref.name):
            return f"{label} from {entry.dist} {entry.version} ({entry.value})"
    return f"{label} not installed (it comes from {ref.dist})"
