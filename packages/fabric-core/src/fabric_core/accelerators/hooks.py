"""Core's own offers where the user left the accelerator open. A hook module like any plugin's."""

from __future__ import annotations

from fabric_core.abc.hooks import Candidate, ResolveContext, hookimpl


@hookimpl
def fabric_accelerator_candidates(ctx: ResolveContext) -> list[Candidate]:
    """Offer the accelerators that need nothing but torch."""
    from fabric_core.accelerators.cpu import CPUAccelerator
    from fabric_core.accelerators.generic import GenericAccelerator
    from fabric_core.accelerators.mps import MPSAccelerator

    mps = MPSAccelerator.is_available()
    offers = []
    for cls in (MPSAccelerator, GenericAccelerator, CPUAccelerator):
        available = cls.is_available()
        if cls is GenericAccelerator and available and GenericAccelerator.device_type() == "mps":
            available = mps  # the class above serves it, and DISABLE_MPS=1 must hold here too
        reason = "it is always there" if cls is CPUAccelerator else "torch reports the device"
        offers.append(
            Candidate(
                cls.name(), cls.priority, available, reason if available else cls.unavailable_reason(), cls.aliases
            )
        )
    return offers
