"""What each claim on a name is worth: pure functions from metadata and switches to references with a status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fabric_core.registry.contract import CORE_VERSION, version_problem
from fabric_core.registry.known import Known
from fabric_core.registry.ref import CORE, GROUPS, Entry, PluginRef, Status, dist_key, name_key
from fabric_core.registry.switches import Switches

Table = Mapping[str, Mapping[str, str]]
"""Kind to name to ``"module:attribute"``."""


@dataclass(frozen=True)
class Rules:
    """What decides between claims on a name.

    Attributes:
        builtin: the plugins of core.
        known: the names that belong to Fabric's own backends.
        switches: what the environment says.
        runtime: kind and key of every name registered at run time.
    """

    builtin: Table
    known: Known
    switches: Switches
    runtime: frozenset[tuple[str, str]] = frozenset()


def builtin_refs(kind: str, builtin: Table) -> tuple[PluginRef, ...]:
    """Core's own plugins of a kind, aliases together."""
    return with_aliases(_each_builtin(kind, builtin))


def judge(kind: str, claims: Sequence[Entry], rules: Rules) -> list[PluginRef]:
    """A reference for every claim on one name, with its status. At most one is ``ok``."""
    verdicts = {entry: _exclusion(entry, rules) for entry in claims}
    live = [entry for entry in claims if verdicts[entry][0] != "blocked"]
    if not live:
        return [_ref(kind, entry, *verdicts[entry]) for entry in claims]
    winner, why = _winner(kind, live, rules)
    refs = []
    for entry in claims:
        status, reason = verdicts[entry]
        if status == "ok" and winner is None and len(live) > 1:
            # One that is incompatible still counts: an upgrade must not hand its name to somebody else in silence.
            rivals = sorted({other.dist for other in live} - {entry.dist}) or [entry.dist]
            status, reason = "ambiguous", f"{', '.join(rivals)} claims the name too"
        elif status == "ok" and winner is not None and dist_key(entry.dist) != winner:
            status, reason = "shadowed", why
        refs.append(_ref(kind, entry, status, reason))
    return refs


def tabulate(kind: str, entries: Iterable[Entry], rules: Rules) -> list[PluginRef]:
    """All plugins of a kind, core's first, aliases together, whatever their status."""
    claims: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.group == GROUPS[kind]:
            claims.setdefault(name_key(entry.name), []).append(entry)
    found = (ref for one_name in claims.values() for ref in judge(kind, distinct(one_name), rules))
    core = with_aliases(_if_outranked(ref, rules) for ref in _each_builtin(kind, rules.builtin))
    return [*core, *sorted(with_aliases(found), key=lambda ref: (name_key(ref.name), ref.dist))]


def with_aliases(refs: Iterable[PluginRef]) -> tuple[PluginRef, ...]:
    """Names of one target in one distribution become one reference, under the name that comes first."""
    groups: dict[tuple[str, str, str, str], list[PluginRef]] = {}
    for ref in refs:
        groups.setdefault((ref.dist, ref.value, ref.status, ref.reason), []).append(ref)
    return tuple(replace(group[0], aliases=tuple(ref.name for ref in group[1:])) for group in groups.values())


def distinct(claims: Iterable[Entry]) -> list[Entry]:
    """The claims without those that only spell a name twice, as ``my-plugin`` and ``my_plugin``."""
    return list({(dist_key(entry.dist), entry.value): entry for entry in claims}.values())


def _exclusion(entry: Entry, rules: Rules) -> tuple[Status, str]:
    reason = rules.switches.blocked(entry.dist)
    if reason:
        return "blocked", reason
    reason = version_problem(entry.dist, entry.version, entry.requires_core, rules.known.minimum)
    return ("incompatible", reason) if reason else ("ok", "")


def _winner(kind: str, live: Sequence[Entry], rules: Rules) -> tuple[str | None, str]:
    """Who has the name before all others, and what the others are told. In the order of ``Lookup.find``."""
    name = live[0].name
    if (kind, name_key(name)) in rules.runtime:
        return "", "the name is registered at run time"
    preferred = rules.switches.preferred(kind, name)
    if preferred:
        return dist_key(preferred), f"the name is preferred from {preferred}"
    if name_key(name) in map(name_key, rules.builtin.get(kind, {})):
        return CORE, f"{CORE} provides the name itself"
    owner = rules.known.owner(kind, name)
    if owner is None:
        return None, ""
    if rules.known.reserved_for(kind, name):
        return owner, f"the name is reserved for {owner}"
    # Only the beginning is known: it is the owner's if the owner uses it, and free if not.
    return (owner, f"{owner} provides the name") if any(dist_key(e.dist) == owner for e in live) else (None, "")


def _each_builtin(kind: str, builtin: Table) -> list[PluginRef]:
    return [PluginRef(kind, name, value, CORE, CORE_VERSION) for name, value in builtin.get(kind, {}).items()]


def _if_outranked(ref: PluginRef, rules: Rules) -> PluginRef:
    if (ref.kind, name_key(ref.name)) in rules.runtime:
        return replace(ref, status="shadowed", reason="the name is registered at run time")
    preferred = rules.switches.preferred(ref.kind, ref.name)
    return replace(ref, status="shadowed", reason=f"the name is preferred from {preferred}") if preferred else ref


def _ref(kind: str, entry: Entry, status: Status, reason: str) -> PluginRef:
    return PluginRef(kind, entry.name, entry.value, entry.dist, entry.version, status=status, reason=reason)
