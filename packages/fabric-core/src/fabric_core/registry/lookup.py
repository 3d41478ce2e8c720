"""Which plugin a name means. One algorithm, in the order of the steps of ``Lookup.find``; nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UnknownPluginError
from fabric_core.registry import refusals, switches
from fabric_core.registry.discovery import Discovery
from fabric_core.registry.known import Known
from fabric_core.registry.ref import CORE, GROUPS, Entry, PluginRef, check_kind, dist_key, name_key
from fabric_core.registry.runtime import Runtime
from fabric_core.registry.table import Rules, Table, builtin_refs, distinct, judge, tabulate

_IMPORT_STRING: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class Lookup:
    """Finds by name among everything that core, the running program and installed distributions offer."""

    def __init__(self, discovery: Discovery, runtime: Runtime, builtin: Table, known: Known) -> None:
        self._discovery = discovery
        self._runtime = runtime
        self._builtin = builtin
        self._known = known
        self._builtin_by_key = {
            (kind, name_key(name)): ref
            for kind in builtin
            for ref in builtin_refs(check_kind(kind), builtin)
            for name in ref.names
        }

    def find(self, kind: str, name: str, late_names: Callable[[], None]) -> PluginRef:
        """The plugin that the name means; the first step that has an answer decides.

        Args:
            kind: what is looked for.
            name: what the user typed.
            late_names: called before a name is given up, to let hook modules register what cannot be static.
        """
        check_kind(kind)
        if not isinstance(name, str):
            raise InvalidTypeError(f"{kind}={name!r} is not a name: pass text such as a registered name.")
        if "::" in name:
            return self._in_one_distribution(kind, name)
        if ":" in name:
            return _import_string(kind, name)
        scans, again = self._discovery.scans, False
        while True:
            rules = self._rules()
            ref = self._without_scan(kind, name, rules) or self._with_scan(kind, name, rules)
            if ref is None:
                late_names()
                ref = self._runtime.find(kind, name)
            if ref is not None:
                return ref
            if again or self._discovery.scans > scans or not rules.switches.autoload:
                raise self.unknown((kind,), name)
            # The answer came from memory: something may have been installed since, as in a notebook.
            self._discovery.refresh()
            self._discovery.entries()
            again = True

    def refs(self, kind: str) -> list[PluginRef]:
        """Every plugin of a kind, whatever its status: registered at run time, core's, and installed ones."""
        rules = self._rules()
        entries = self._discovery.entries() if rules.switches.autoload else ()
        return [*self._runtime.refs(check_kind(kind)), *tabulate(kind, entries, rules)]

    def unknown(self, kinds: Sequence[str], name: str) -> UnknownPluginError:
        """The error for a name that nothing of these kinds has."""
        owned = [kind for kind in kinds if self._known.owner(kind, name)]
        kinds = owned[:1] or kinds  # the table of known names has the better answer
        refs = [ref for kind in kinds for ref in self.refs(kind)]
        owner = self._known.owner(kinds[0], name)
        of_owner = self._discovery.entries_of(owner) if owner else ()
        around = refusals.Surroundings(
            installed=usable_names(refs),
            owner=owner,
            owner_version=of_owner[0].version if of_owner else None,
            known={one: self._known.reserved_for(kind, one) or "" for kind in kinds for one in self._known.full(kind)},
            others=[ref for ref in refs if name_key(name) in map(name_key, ref.names) and ref.status == "shadowed"],
            autoload=switches.current().autoload,
        )
        return refusals.unknown(kinds[0] if len(kinds) == 1 else "plugin", name, around)

    def _without_scan(self, kind: str, name: str, rules: Rules) -> PluginRef | None:
        registered = self._runtime.find(kind, name)
        if registered is not None:
            return registered
        preferred = rules.switches.preferred(kind, name)
        if preferred:
            refs = judge(kind, self._claims(kind, name, self._discovery.entries_of(preferred)), rules)
            if not refs:
                raise refusals.preferred_missing(kind, name, preferred)
            return _choose(kind, name, refs)
        builtin = self._builtin_by_key.get((kind, name_key(name)))
        if builtin is not None:
            return builtin
        owner = self._known.owner(kind, name)
        if owner is None:
            return None
        return _choose(kind, name, judge(kind, self._claims(kind, name, self._discovery.entries_of(owner)), rules))

    def _with_scan(self, kind: str, name: str, rules: Rules) -> PluginRef | None:
        if not rules.switches.autoload:
            return None
        return _choose(kind, name, judge(kind, self._claims(kind, name, self._discovery.entries()), rules))

    def _in_one_distribution(self, kind: str, qualified: str) -> PluginRef:
        dist, _, name = qualified.partition("::")
        rules = self._rules()
        builtin = self._builtin_by_key.get((kind, name_key(name)))
        if dist_key(dist) == CORE and builtin is not None:
            return builtin
        for refresh in (False, True):
            if refresh:
                self._discovery.refresh()
            entries = self._discovery.entries_of(dist)
            claims = self._claims(kind, name, entries)
            if claims:
                chosen = _choose(kind, name, judge(kind, claims, _without_rivals(rules)))
                assert chosen is not None, "nothing is shadowed where there are no rivals"
                return chosen
        offered = [entry.name for entry in entries if entry.group == GROUPS[kind]]
        raise refusals.not_in_dist(kind, name, dist, offered)

    def _claims(self, kind: str, name: str, entries: tuple[Entry, ...]) -> list[Entry]:
        key = name_key(name)
        return distinct(entry for entry in entries if entry.group == GROUPS[kind] and name_key(entry.name) == key)

    def _rules(self) -> Rules:
        return Rules(self._builtin, self._known, switches.current(), self._runtime.keys())


def usable_names(refs: list[PluginRef]) -> list[str]:
    """The names that can be passed as they are, aliases included, each once."""
    return list(dict.fromkeys(name for ref in refs if ref.status == "ok" for name in ref.names))


def _choose(kind: str, name: str, refs: list[PluginRef]) -> PluginRef | None:
    """The one that can be used; an error if there is a choice or an obstacle; ``None`` if nobody has a claim."""
    for ref in refs:
        if ref.status == "ok":
            return ref
    contested = [ref for ref in refs if ref.status in ("ambiguous", "incompatible")]
    if len(contested) > 1:
        raise refusals.ambiguous(kind, name, contested)
    for ref in refs:
        if ref.status in ("incompatible", "blocked"):
            raise refusals.unusable(ref)
    return None  # shadowed by somebody who is not installed


def _without_rivals(rules: Rules) -> Rules:
    # Whoever names the distribution has settled every contest; its switches and versions still count.
    return Rules({}, Known(names={}, minimum=rules.known.minimum), replace(rules.switches, prefer={}))


def _import_string(kind: str, text: str) -> PluginRef:
    if not _IMPORT_STRING.fullmatch(text):
        raise InvalidArgumentError(
            f'{kind}={text!r} is neither an import string, "package.module:Class", nor "distribution::name".'
        )
    return PluginRef(kind, text, text)
