"""Which plugins may take part, as the environment says it. Applied before anything is imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from fabric_core import settings
from fabric_core.errors import InvalidArgumentError
from fabric_core.registry.ref import CORE, check_kind, dist_key, name_key


@dataclass(frozen=True)
class Switches:
    """The switches at one moment.

    Attributes:
        autoload: whether installed plugins are looked at in any way.
        allow: distributions that may be used; ``None`` for all.
        block: distributions that may not.
        prefer: who provides a contested name, by kind and name.
        strict: a hook module that cannot be loaded, or a hook that fails, is an error.
    """

    autoload: bool = True
    allow: frozenset[str] | None = None
    block: frozenset[str] = frozenset()
    prefer: Mapping[tuple[str, str], str] = field(default_factory=dict)
    strict: bool = False

    def blocked(self, dist: str) -> str:
        """Which switch keeps the distribution out, in words; empty if none does."""
        key = dist_key(dist)
        if key == CORE:
            return ""
        if not self.autoload:
            return f"{settings.DISABLE_PLUGIN_AUTOLOAD.name} is set"
        if key in self.block:
            return f"{settings.PLUGINS_BLOCK.name} lists {dist}"
        if self.allow is not None and key not in self.allow:
            return f"{settings.PLUGINS.name} is set and does not list {dist}"
        return ""

    def preferred(self, kind: str, name: str) -> str | None:
        """The distribution that is to provide the name, as far as the user said."""
        return self.prefer.get((kind, name_key(name)))


def current() -> Switches:
    """The switches as the environment has them now."""
    allow = settings.PLUGINS.names()
    return Switches(
        autoload=not settings.DISABLE_PLUGIN_AUTOLOAD.flag(),
        allow=None if allow is None else frozenset(map(dist_key, allow)),
        block=frozenset(map(dist_key, settings.PLUGINS_BLOCK.names() or ())),
        prefer=dict(map(_preference, settings.PLUGINS_PREFER.names() or ())),
        strict=settings.PLUGINS_STRICT.flag(),
    )


def trace(message: str) -> None:
    """Tell what the registry does, on stderr, if the user asked for it."""
    if settings.PLUGINS_TRACE.flag():
        sys.stderr.write(f"fabric plugins: {message}\n")


def _preference(word: str) -> tuple[tuple[str, str], str]:
    choice, _, dist = word.rpartition("=")
    kind, _, name = choice.partition(".")  # precision names may hold dots themselves
    if not (kind and name and dist):
        raise InvalidArgumentError(
            f"{settings.PLUGINS_PREFER.name} holds {word!r}: write kind.name=distribution, as in "
            "strategy.my-plugin=fabric-my-plugin."
        )
    return (check_kind(kind), name_key(name)), dist.strip()
