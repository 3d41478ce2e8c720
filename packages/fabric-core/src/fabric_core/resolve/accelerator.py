"""Which accelerator: the one named, or the best that is available."""

from __future__ import annotations

from typing import Any

from fabric_core.abc.accelerator import Accelerator
from fabric_core.abc.choosing import Candidate, ResolveContext
from fabric_core.accelerator_of_torch import accelerator_of_torch
from fabric_core.errors import InvalidTypeError, UnknownPluginError, UsageError
from fabric_core.rank_zero import rank_zero_info, rank_zero_warn
from fabric_core.registry import Registry
from fabric_core.registry.known import device_hint
from fabric_core.registry.ref import CORE
from fabric_core.resolve.candidates import collect_candidates, pick
from fabric_core.resolve.choice import Choice
from fabric_core.resolve.objects import Objects
from fabric_core.resolve.request import Request

_HOOK = "fabric_accelerator_candidates"


def choose_accelerator(
    request: Request, objects: Objects, registry: Registry, ctx: ResolveContext
) -> Choice[Accelerator]:
    """The accelerator object.

    Raises:
        TypeError: neither a name, an ``Accelerator`` nor a subclass.
        ValueError: an unknown name.
        RuntimeError: the device is not there; the message lists those that are.
    """
    if objects.accelerator is not None:
        value = _available(objects.accelerator.value, registry, ctx)
        return Choice(value, value.name(), objects.accelerator.origin)
    asked = request.accelerator
    wanted = asked.value
    if isinstance(wanted, type) and issubclass(wanted, Accelerator):
        return Choice(_available(wanted(), registry, ctx), wanted.name(), asked.origin)
    if not isinstance(wanted, str):
        raise InvalidTypeError(
            f"accelerator={wanted!r} ({type(wanted).__name__}): expected a name such as "
            f"{', '.join(map(repr, ['auto', 'gpu', *registry.names('accelerator')]))}, or an Accelerator."
        )
    name = wanted.strip().lower()
    if objects.devices is not None and name == "auto":
        return _from_devices(objects.devices.value, objects.devices.origin, registry, ctx)
    if name == "auto":
        return _best(registry, ctx, asked.origin if asked.given else "auto")
    return _named(name, asked.origin, registry, ctx)


def _named(name: str, origin: str, registry: Registry, ctx: ResolveContext) -> Choice[Accelerator]:
    try:
        ref = registry.find("accelerator", name)
    except UnknownPluginError:
        offers = [o for o in collect_candidates(registry, _HOOK, ctx) if name in o.aliases]
        if not offers:
            raise
        return _by_alias(name, offers, origin, registry, ctx)
    value: Accelerator = registry.create("accelerator", ref)
    return Choice(_available(value, registry, ctx), ref.name, origin, "", ref)


def _by_alias(
    alias: str, offers: list[Candidate], origin: str, registry: Registry, ctx: ResolveContext
) -> Choice[Accelerator]:
    usable = [offer for offer in offers if offer.available]
    if not usable:
        reasons = "; ".join(f"{offer.name}: {offer.reason}" for offer in offers)
        raise UsageError(f"accelerator={alias!r}: none is available here ({reasons}). {_available_text(registry, ctx)}")
    best = pick(usable, f"accelerator for {alias!r}")
    return _create(best, origin, f"the best available {alias}", registry)


def _best(registry: Registry, ctx: ResolveContext, origin: str) -> Choice[Accelerator]:
    offers = [offer for offer in collect_candidates(registry, _HOOK, ctx) if offer.auto]
    best = pick([offer for offer in offers if offer.available], "accelerator")
    chosen = _create(best, origin, best.reason, registry)
    _tell_of_better_plugin(chosen)
    return chosen


def _create(offer: Candidate, origin: str, reason: str, registry: Registry) -> Choice[Accelerator]:
    ref = registry.find("accelerator", offer.name)
    return Choice(registry.create("accelerator", ref), offer.name, origin, reason, ref)


def _from_devices(devices: Any, origin: str, registry: Registry, ctx: ResolveContext) -> Choice[Accelerator]:
    first = devices[0] if isinstance(devices, (list, tuple)) else devices
    for offer in sorted(collect_candidates(registry, _HOOK, ctx), key=lambda offer: -offer.priority):
        if not offer.available:
            continue
        chosen = _create(offer, origin, f"the strategy's devices are {first.type}", registry)
        if chosen.value.device_type() == first.type:
            return chosen
    raise UsageError(f"{origin} names {first.type} devices, which no available accelerator serves. "
                     f"{_available_text(registry, ctx)}")  # fmt: skip


def _available(accelerator: Accelerator, registry: Registry, ctx: ResolveContext) -> Accelerator:
    if accelerator.is_available():
        return accelerator
    raise UsageError(
        f"accelerator={accelerator.name()!r} is not available: {accelerator.unavailable_reason()}. "
        f"{_available_text(registry, ctx)}"
    )


def _available_text(registry: Registry, ctx: ResolveContext) -> str:
    names = [repr(o.name) for o in collect_candidates(registry, _HOOK, ctx) if o.available]
    return f"Available here: {', '.join(names)}."


def _tell_of_better_plugin(chosen: Choice[Accelerator]) -> None:
    """Where torch reports a device that only core serves, or nobody: name the package that is made for it."""
    device = accelerator_of_torch()
    hint = device_hint(device.type) if device is not None else None
    if device is None or hint is None or chosen.ref is None or chosen.ref.dist != CORE:
        return
    if chosen.value.device_type() == device.type:
        rank_zero_info(
            f"Using {device.type} through accelerator={chosen.name!r}. For all it offers: pip install {hint}"
        )
    else:
        rank_zero_warn(
            f"torch reports {device.type} devices, but no plugin that is installed serves them, so this runs on "
            f"{chosen.value.device_type()}: pip install {hint}"
        )
