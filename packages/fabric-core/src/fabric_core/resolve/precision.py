"""Which precision: the object given, or the name, looked up in the family of the strategy."""

from __future__ import annotations

from typing import Any

from fabric_core.abc.accelerator import Accelerator
from fabric_core.abc.choosing import ResolveContext
from fabric_core.abc.precision import Precision
from fabric_core.abc.strategy import Strategy
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, PluginError, UnknownPluginError
from fabric_core.precision.names import AMBIGUOUS, SHORT, full_name
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.registry import Registry
from fabric_core.resolve.choice import Choice, plugin_text
from fabric_core.resolve.objects import Objects
from fabric_core.resolve.request import Request


def choose_precision(
    request: Request,
    objects: Objects,
    strategy: Strategy,
    accelerator: Accelerator,
    registry: Registry,
    ctx: ResolveContext,
) -> Choice[Precision]:
    """The precision object.

    Raises:
        TypeError: neither a spelling, a number nor a ``Precision`` subclass.
        ValueError: a spelling that nothing registers, or not for this family of strategies.
    """
    if objects.precision is not None:
        value = objects.precision.value
        return Choice(value, str(getattr(value, "precision", type(value).__name__)), objects.precision.origin)
    asked = request.precision
    if isinstance(asked.value, type) and issubclass(asked.value, Precision):
        return Choice(registry.create("precision", asked.value), asked.value.__name__, asked.origin)
    name, origin, reason = _name(request, registry, ctx)
    substitute = accelerator.instead_of.get(name) if strategy.precision_family is None else None
    if substitute is not None:
        rank_zero_warn(
            f"precision={name!r} does not run on accelerator={ctx.accelerator!r}: using {substitute!r} instead. Pass "
            f"precision={substitute!r} to silence this."
        )
        name, reason = substitute, f"{name!r} does not run on {ctx.accelerator}"
    ref = _find(name, strategy.precision_family, registry)
    value = registry.create("precision", ref, precision=name, device=accelerator.device_type())
    if not isinstance(value, Precision):
        raise InvalidTypeError(
            f"precision={name!r} ({plugin_text(ref)}) made a {type(value).__name__}, which is no "
            "fabric_core.abc.Precision. This is a defect of that plugin."
        )
    return Choice(value, name, origin, reason, ref)


def _name(request: Request, registry: Registry, ctx: ResolveContext) -> tuple[str, str, str]:
    """Full name, origin and reason."""
    asked = request.precision
    if asked.value is None:
        if registry.has_hook("fabric_select_precision"):
            suggestion = registry.hooks.fabric_select_precision(ctx=ctx)
            if suggestion is not None:
                return full_name(suggestion), "auto", f"suggested for {ctx.accelerator}"
        return "32-true", "default", ""
    if isinstance(asked.value, Precision):
        raise InvalidTypeError(
            f"precision= was given an object, a {type(asked.value).__name__}: pass it as plugins=[...]. "
            f"precision= takes {_expected(registry)}."
        )
    if isinstance(asked.value, bool) or not isinstance(asked.value, (str, int)):
        raise InvalidTypeError(
            f"precision={asked.value!r} ({type(asked.value).__name__}): expected {_expected(registry)}."
        )
    text = str(asked.value).strip().lower()
    if text in AMBIGUOUS:
        rank_zero_warn(
            f"precision={asked.value!r} means {SHORT[text]!r}, which it does not show: weights stay in float32. "
            f"Write precision={SHORT[text]!r}, or {SHORT[text].replace('mixed', 'true')!r} for 16-bit weights."
        )
    return full_name(asked.value), asked.origin, ""


def _find(name: str, family: str | None, registry: Registry) -> Any:
    if family is None or (":" in name and "::" not in name):  # an import string means one thing everywhere
        return registry.find("precision", name)
    try:
        return registry.find("precision", f"{family}.{name}")
    except UnknownPluginError:
        known = [n.split(".", 1)[1] for n in registry.names("precision") if n.startswith(f"{family}.")]
        raise InvalidArgumentError(
            f"precision={name!r} {_outside(name, registry)} {family} strategies, which take "
            f"{', '.join(map(repr, known))}. Pass one of these, or another strategy."
        ) from None


def _outside(name: str, registry: Registry) -> str:
    """What to say of a name that the family lacks: whether there is such a precision, and whose it is."""
    try:
        ref = registry.find("precision", name)
    except PluginError:
        return "does not exist for"
    owner = plugin_text(ref)
    return f"({owner}) does not go with" if owner else "does not go with"


def _expected(registry: Registry) -> str:
    names = [name for name in registry.names("precision") if "." not in name]
    return f"one of {', '.join(map(repr, names))} (short: {', '.join(map(repr, SHORT))})"
