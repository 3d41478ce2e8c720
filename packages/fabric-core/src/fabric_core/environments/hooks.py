"""Core's own offers where the user left the environment open. A hook module like any plugin's."""

from __future__ import annotations

from fabric_core.abc.hooks import Candidate, ResolveContext, hookimpl


@hookimpl
def fabric_environment_candidates(ctx: ResolveContext) -> list[Candidate]:
    """Offer torchrun's processes if this is one of them, and a lone machine in any case."""
    from fabric_core.environments.default import LightningEnvironment
    from fabric_core.environments.torchelastic import TorchElasticEnvironment

    elastic = TorchElasticEnvironment.detect()
    reason = "TORCHELASTIC_RUN_ID is set" if elastic else "TORCHELASTIC_RUN_ID is not set"
    return [
        Candidate("torchelastic", TorchElasticEnvironment.priority, elastic, reason),
        Candidate("default", LightningEnvironment.priority, True, "it is the fall-back"),
    ]
