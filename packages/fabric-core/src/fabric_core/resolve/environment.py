"""Which cluster environment: the one given, else the first that recognises itself."""

from __future__ import annotations

from fabric_core.abc.choosing import ResolveContext
from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.registry import Registry
from fabric_core.resolve.candidates import collect_candidates, pick
from fabric_core.resolve.choice import Choice
from fabric_core.resolve.objects import Objects


def choose_environment(objects: Objects, registry: Registry, ctx: ResolveContext) -> Choice[ClusterEnvironment]:
    """The environment object; detection never fails, because the fall-back for a lone machine always applies."""
    if objects.environment is not None:
        value = objects.environment.value
        return Choice(value, type(value).__name__, objects.environment.origin)
    offers = collect_candidates(registry, "fabric_environment_candidates", ctx)
    best = pick([offer for offer in offers if offer.available], "cluster environment")
    ref = registry.find("environment", best.name)
    return Choice(registry.create("environment", ref), best.name, "auto", best.reason, ref)
