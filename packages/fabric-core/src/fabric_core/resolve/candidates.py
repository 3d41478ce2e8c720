"""Asking plugins for offers, and taking the best one."""

from __future__ import annotations

from typing import Any

from fabric_core.abc.choosing import Candidate, ResolveContext
from fabric_core.errors import AmbiguousPluginError, UsageError
from fabric_core.registry import Registry


def collect_candidates(registry: Registry, hook: str, ctx: ResolveContext) -> list[Candidate]:
    """Every offer that plugins make through ``hook``; an implementation may return one, several or nothing."""
    offers: list[Candidate] = []
    answers: list[Any] = getattr(registry.hooks, hook)(ctx=ctx)
    for answer in answers:
        if isinstance(answer, Candidate):
            offers.append(answer)
        elif answer:
            offers.extend(answer)
    return offers


def pick(offers: list[Candidate], what: str) -> Candidate:
    """The offer of the highest priority.

    Raises:
        UsageError: there is none.
        AmbiguousPluginError: two share the highest priority.
    """
    if not offers:
        raise UsageError(f"No plugin offers a {what} here. `fabric plugins list` shows which are broken or kept out.")
    ranked = sorted(offers, key=lambda offer: -offer.priority)
    if len(ranked) > 1 and ranked[0].priority == ranked[1].priority:
        names = ", ".join(repr(offer.name) for offer in ranked if offer.priority == ranked[0].priority)
        raise AmbiguousPluginError(
            f"Several plugins offer a {what} with the same priority {ranked[0].priority}: {names}. Name the one to use."
        )
    return ranked[0]
