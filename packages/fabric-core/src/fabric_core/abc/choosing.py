"""The values that hooks exchange with core. Plugins import them from ``fabric_core.abc.hooks``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fabric_core.errors import InvalidArgumentError


@dataclass(frozen=True)
class Candidate:
    """A plugin's offer to be chosen where the user left the choice open.

    Attributes:
        name: a registered name.
        priority: the highest available candidate wins; a tie is an error.
        available: whether it can be used now, found out without initialising the device's runtime.
        reason: why it is or is not available, for messages and ``explain()``.
        aliases: further names it answers to, such as ``gpu``.
        auto: whether it takes part when nothing was named; otherwise it answers to its aliases only.
    """

    name: str
    priority: int
    available: bool
    reason: str = ""
    aliases: frozenset[str] = frozenset()
    auto: bool = True


@dataclass(frozen=True)
class Problem:
    """Something in a plan that cannot work.

    Attributes:
        message: what is wrong, in words for the user.
        fix: what to type instead.
        error: the class to raise when this is the only problem.
    """

    message: str
    fix: str = ""
    error: type[Exception] = InvalidArgumentError


@dataclass(frozen=True)
class ResolveContext:
    """What is known at the moment a hook is asked to choose. Fields not decided yet are ``None``.

    Attributes:
        accelerator: registered name.
        num_devices: processes or devices on this node.
        num_nodes: nodes in all.
        strategy: registered name.
        precision: canonical name.
        environment: registered name.
        interactive: whether this is a notebook or a prompt.
        requested: what the user passed, by argument name, before any choice.
    """

    accelerator: str | None = None
    num_devices: int | None = None
    num_nodes: int = 1
    strategy: str | None = None
    precision: str | None = None
    environment: str | None = None
    interactive: bool = False
    requested: Mapping[str, Any] = field(default_factory=dict)
