"""The sentences for names that cannot be used: what was passed, what exists, what to type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fabric_core import settings
from fabric_core.errors import (
    AmbiguousPluginError,
    IncompatiblePluginError,
    PluginBlockedError,
    PluginError,
    UnknownPluginError,
)
from fabric_core.registry.ref import CORE, PluginRef, name_key


@dataclass(frozen=True)
class Surroundings:
    """What there is beside the name that was not found.

    Attributes:
        installed: names of the kind that can be used.
        owner: the distribution the name belongs to, if the table of known names has it.
        owner_version: its version, ``None`` if it is not installed.
        known: further names that other distributions of Fabric would provide, with the distribution.
        others: installed plugins that claim the name without a right to it.
        autoload: whether installed plugins were looked at.
    """

    installed: Sequence[str] = ()
    owner: str | None = None
    owner_version: str | None = None
    known: dict[str, str] = field(default_factory=dict)
    others: Sequence[PluginRef] = ()
    autoload: bool = True


def unusable(ref: PluginRef) -> PluginError:
    """The error for a plugin that is installed and cannot be used."""
    if ref.status == "blocked":
        return PluginBlockedError(f"{ref} is installed but kept out: {ref.reason}. Change that variable to use it.")
    return IncompatiblePluginError(
        f"{ref} does not fit this core: {ref.reason}. Install versions that fit: "
        f"pip install --upgrade {CORE} {ref.dist}"
    )


def ambiguous(kind: str, name: str, refs: Sequence[PluginRef]) -> AmbiguousPluginError:
    """The error for a name that several plugins claim, with the spellings that choose one."""
    dists = {ref.dist for ref in refs}
    if len(dists) == 1:
        values = " and ".join(ref.value for ref in refs)
        return AmbiguousPluginError(
            f"{kind}={name!r} is declared twice by {refs[0].origin}, for {values}: pass one of these instead."
        )
    return AmbiguousPluginError(
        f"{kind}={name!r} is provided by {_join(ref.origin for ref in refs)}. Choose one: "
        + " or ".join(f'{kind}="{ref.qualified}"' for ref in refs)
        + f"; for all programs, set {settings.PLUGINS_PREFER.name}={kind}.{name}={refs[0].dist}."
    )


def preferred_missing(kind: str, name: str, dist: str) -> UnknownPluginError:
    """The error for a preference that points to a distribution without the name."""
    return UnknownPluginError(
        f"{settings.PLUGINS_PREFER.name} gives {kind} {name!r} to {dist}, which is not installed or has no such "
        f"{kind}: correct the variable, or pip install {dist}"
    )


def not_in_dist(kind: str, name: str, dist: str, offered: Sequence[str]) -> UnknownPluginError:
    """The error for ``"dist::name"`` when the distribution has no such name."""
    if not offered:
        return UnknownPluginError(f'{kind}="{dist}::{name}": {dist} is not installed or provides no {kind}.')
    return UnknownPluginError(
        f'{kind}="{dist}::{name}": {dist} has no {kind} {name!r}. It provides: {", ".join(offered)}.'
    )


def unknown(kind: str, name: str, around: Surroundings) -> UnknownPluginError:
    """The error for a name that nothing provides: who would, what was probably meant, or what there is."""
    sentences = [_who_would_provide(kind, name, around) or f"{kind}={name!r} is not known."]
    sentences += [f'{ref.origin} claims the name too: pass {kind}="{ref.qualified}" for it.' for ref in around.others]
    if around.owner is None or around.owner_version is not None:
        sentences += [_did_you_mean(name, around), f"Installed: {', '.join(around.installed) or 'none'}."]
    if not around.autoload:
        sentences.append(f"{settings.DISABLE_PLUGIN_AUTOLOAD.name} is set, so installed plugins were not looked at.")
    return UnknownPluginError(
        ("\n" if sentences[0].endswith(f"pip install {around.owner}") else " ").join(filter(None, sentences))
    )


def _who_would_provide(kind: str, name: str, around: Surroundings) -> str:
    if around.owner is None:
        return ""
    if around.owner_version is None:
        # The command ends the sentence without a full stop, so that it can be copied.
        return f'{kind} "{name}" is provided by {around.owner}, which is not installed: pip install {around.owner}'
    return (
        f'{kind} "{name}" belongs to {around.owner}, whose installed version {around.owner_version} has no such name.'
    )


def _did_you_mean(name: str, around: Surroundings) -> str:
    import difflib

    spelling = {name_key(one): one for one in (*around.known, *around.installed)}
    close = difflib.get_close_matches(name_key(name), spelling, n=1, cutoff=0.6)
    if not close:
        return ""
    meant = spelling[close[0]]
    dist = around.known.get(meant)
    hint = f" (pip install {dist})" if dist and meant not in around.installed else ""
    return f'Did you mean "{meant}"{hint}?'


def _join(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
