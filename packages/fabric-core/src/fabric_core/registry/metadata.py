"""Reads the metadata of installed distributions; the only module that may.

Imported at the first scan, not before: reading metadata drags in some thirty modules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fabric_core.registry.ref import CORE, Entry, dist_key

# Before 3.12 the standard library's reader differs from what it became; the backport is the same everywhere.
if sys.version_info >= (3, 12):
    import importlib.metadata as reader
else:
    import importlib_metadata as reader

if TYPE_CHECKING:
    from typing import Any

_OUR_GROUPS = "fabric."


@dataclass(frozen=True)
class Scan:
    """What the installed distributions declare.

    Attributes:
        entries: all entry points in groups that begin with ``fabric.``.
        damaged: distributions whose metadata cannot be read, each with the reason.
    """

    entries: tuple[Entry, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()


def scan() -> Scan:
    """Look through every installed distribution once. One that is damaged is reported and hurts no other.

    ``entry_points()`` of the standard library is not used: a single unreadable file makes it fail as a whole.
    """
    # A distribution can be on the path twice, as after an editable install. ``lookup`` answers for the one that
    # Python imports, so a stale copy further down the path adds nothing.
    dists: dict[str, None] = {}
    damaged: list[tuple[str, str]] = []
    for dist in reader.distributions():
        name, problem = _name_of_plugin(dist)
        if name:
            dists[name] = None
        if problem:
            damaged.append((_label(dist), problem))
    found = [lookup(dist) for dist in dists]
    return Scan(
        entries=tuple(entry for one in found for entry in one.entries),
        damaged=(*damaged, *(problem for one in found for problem in one.damaged)),
    )


def lookup(name: str) -> Scan:
    """What one distribution declares, without a look at the others. Empty if it is not installed."""
    try:
        dist = reader.distribution(name)
    except reader.PackageNotFoundError:
        return Scan()
    try:
        return Scan(entries=tuple(_entries(dist)))
    except Exception as error:  # as in _name_of_plugin
        return Scan(damaged=((name, repr(error)),))


def _name_of_plugin(dist: Any) -> tuple[str, str]:
    """The name, empty if the distribution declares nothing of ours, and what is wrong with it."""
    try:
        ours = _OUR_GROUPS in (dist.read_text("entry_points.txt") or "")
        return (dist_key(dist.metadata["Name"]) if ours else ""), ""
    except Exception as error:  # whatever is wrong with one distribution, the others are still there
        return "", repr(error)


def _entries(dist: Any) -> Iterator[Entry]:
    facts = dist.metadata  # parsed anew at each access
    requires = tuple(text for text in facts.get_all("Requires-Dist") or () if _is_on_core(text))
    for point in dist.entry_points:
        if point.group.startswith(_OUR_GROUPS):
            yield Entry(point.group, point.name, point.value, facts["Name"], facts["Version"] or "", requires)


def _is_on_core(requirement: str) -> bool:
    # A cheap look, so that `packaging` is imported only for what may matter. `fabric-core-extras` passes it too;
    # contract.py reads the name properly.
    return dist_key(requirement).startswith(CORE)


def _label(dist: Any) -> str:
    # The public API has no path; the folder's own name is what the user can look for.
    return str(getattr(dist, "_path", dist))
