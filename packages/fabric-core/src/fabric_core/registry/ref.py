"""What a plugin is called and where it comes from. Data only: nothing here looks anything up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from fabric_core.errors import InvalidArgumentError

CORE: Final = "fabric-core"
GROUPS: Final[dict[str, str]] = {
    "accelerator": "fabric.accelerators",
    "strategy": "fabric.strategies",
    "precision": "fabric.precision",
    "environment": "fabric.environments",
    "checkpoint_io": "fabric.checkpoint_io",
    "logger": "fabric.loggers",
    "command": "fabric.cli",
}
"""Kind of plugin to entry-point group."""
HOOK_GROUP: Final = "fabric.hooks"
"""The group of hook modules. They are no kind: nobody chooses one by name."""

Status: TypeAlias = Literal["ok", "shadowed", "ambiguous", "blocked", "incompatible"]


def name_key(name: str) -> str:
    """The form in which names are compared: lower case, ``-`` the same as ``_``."""
    return name.lower().replace("-", "_")


def dist_key(dist: str) -> str:
    """The form in which names of distributions are compared, as package indexes do."""
    return re.sub(r"[-_.]+", "-", dist).lower()


def check_kind(kind: str) -> str:
    """The kind itself; ``InvalidArgumentError`` if there is no such kind of plugin."""
    if kind not in GROUPS:
        raise InvalidArgumentError(f"kind={kind!r} is no kind of plugin: use one of {', '.join(GROUPS)}.")
    return kind


@dataclass(frozen=True)
class Entry:
    """One entry point of an installed distribution, as its metadata states it.

    Attributes:
        group: entry-point group, such as ``fabric.strategies``.
        name: as the distribution spells it.
        value: ``"module:attribute"``.
        dist: distribution name.
        version: version of the distribution.
        requires_core: its requirements on ``fabric-core``, such as ``"fabric-core<2,>=1"``.
    """

    group: str
    name: str
    value: str
    dist: str
    version: str = ""
    requires_core: tuple[str, ...] = ()


@dataclass(frozen=True)
class PluginRef:
    """A plugin by name and origin, not imported. Equal on two machines if both have the same plugin installed.

    Attributes:
        kind: a key of ``GROUPS``.
        name: the registered spelling.
        value: ``"module:attribute"``.
        dist: the distribution it comes from; empty for import strings and what was registered at run time.
        version: version of that distribution.
        aliases: further names of the same target.
        status: ``ok``, or why the plain name does not choose it: ``shadowed`` by another one that comes first,
            ``ambiguous`` between several, ``blocked`` by a switch, ``incompatible`` with this core.
        reason: the status in words; empty for ``ok``.
    """

    kind: str
    name: str
    value: str
    dist: str = ""
    version: str = ""
    aliases: tuple[str, ...] = ()
    status: Status = "ok"
    reason: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)

    @property
    def qualified(self) -> str:
        """The spelling that means this plugin and no other, whatever else is installed."""
        return f"{self.dist}::{self.name}" if self.dist else self.value

    @property
    def origin(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.dist} {self.version}".strip() or self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.origin}" if self.dist else f"{self.kind} {self.value!r}"
