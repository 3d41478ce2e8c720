"""Which strategy: the one named or given, a plugin's suggestion for its own accelerator, or core's own rule."""

from __future__ import annotations

from typing import Any

from fabric_core.abc.accelerator import Accelerator
from fabric_core.abc.choosing import ResolveContext
from fabric_core.abc.strategy import Strategy
from fabric_core.errors import InvalidTypeError
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.registry import Registry
from fabric_core.resolve.choice import Choice, plugin_text
from fabric_core.resolve.request import Request


def choose_strategy(
    request: Request, accelerator: Accelerator, registry: Registry, ctx: ResolveContext
) -> Choice[Strategy]:
    """The strategy object, not connected to any device.

    Raises:
        TypeError: neither a name, a ``Strategy`` nor a subclass.
        ValueError: an unknown name.
    """
    asked = request.strategy
    wanted = asked.value
    if isinstance(wanted, Strategy):
        return Choice(wanted, type(wanted).__name__, f"argument strategy={type(wanted).__name__}(...)")
    if isinstance(wanted, type) and issubclass(wanted, Strategy):
        return Choice(registry.create("strategy", wanted), wanted.__name__, asked.origin)
    if not isinstance(wanted, str):
        raise InvalidTypeError(
            f"strategy={wanted!r} ({type(wanted).__name__}): expected a name such as "
            f"{', '.join(map(repr, registry.names('strategy')))}, or a Strategy."
        )
    name, origin, reason = wanted.strip(), asked.origin, ""
    if name.lower() == "auto":
        origin = asked.origin if asked.given else "auto"
        name, reason = _suggest(registry, ctx)
    substitute = accelerator.instead_of.get(name.lower())
    if substitute is not None:
        rank_zero_warn(
            f"strategy={name!r} does not run on accelerator={ctx.accelerator!r}: using {substitute!r} instead. "
            f"Pass strategy={substitute!r} to silence this."
        )
        name, reason = substitute, f"{name!r} does not run on {ctx.accelerator}"
    ref = registry.find("strategy", name)
    return Choice(_create(registry, ref), ref.name, origin, reason, ref)


def _create(registry: Registry, ref: Any) -> Strategy:
    strategy = registry.create("strategy", ref)
    if not isinstance(strategy, Strategy):
        raise InvalidTypeError(
            f"strategy={ref.name!r} ({plugin_text(ref)}) made a {type(strategy).__name__}, which is no "
            "fabric_core.abc.Strategy. This is a defect of that plugin."
        )
    return strategy


def _suggest(registry: Registry, ctx: ResolveContext) -> tuple[str, str]:
    """The name that ``"auto"`` stands for, and why. A plugin speaks for its own accelerator only."""
    if registry.has_hook("fabric_select_strategy"):
        suggestion = registry.hooks.fabric_select_strategy(ctx=ctx)
        if suggestion is not None:
            return suggestion, f"suggested for {ctx.accelerator}"
    if ctx.num_nodes > 1:
        return "ddp", f"{ctx.num_nodes} nodes"
    if (ctx.num_devices or 1) <= 1:
        return "single_device", "one device"
    if ctx.interactive:
        return "ddp_fork", f"{ctx.num_devices} devices in an interactive session"
    return "ddp", f"{ctx.num_devices} devices"
