"""What cannot go together, as a table of checks. All problems are reported at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from fabric_core.abc.choosing import Problem
from fabric_core.errors import InvalidArgumentError, MisconfigurationException, UsageError
from fabric_core.registry import Registry
from fabric_core.resolve.choice import Choice

if TYPE_CHECKING:
    from fabric_core.resolve.plan import Plan

Check = Callable[["Plan"], "Problem | None"]


def _single_device_accelerator(plan: Plan) -> Problem | None:
    limit = plan.accelerator.value.max_devices
    if limit is None or limit > 1 or not plan.strategy.value.multiple_devices:
        return None
    return Problem(
        f"strategy={plan.strategy.name!r} ({plan.strategy.origin}) runs on several devices, but "
        f"accelerator={plan.accelerator.name!r} ({plan.accelerator.origin}) has one only.",
        'Use strategy="auto", or accelerator="cpu" to run several processes.',
    )


def _too_many_devices(plan: Plan) -> Problem | None:
    limit, count = plan.accelerator.value.max_devices, len(plan.devices.value)
    if limit is None or count <= limit:
        return None
    return Problem(
        f"devices={plan.devices.name} ({plan.devices.origin}) are more than the {limit} that "
        f"accelerator={plan.accelerator.name!r} can use.",
        f"Use devices={limit}.",
        MisconfigurationException,
    )


def _one_of_many(plan: Plan) -> Problem | None:
    count = len(plan.devices.value)
    if (count <= 1 and plan.num_nodes.value <= 1) or plan.strategy.value.multiple_devices:
        return None
    return Problem(
        f"strategy={plan.strategy.name!r} ({plan.strategy.origin}) uses one device, but devices={plan.devices.name} "
        f"({plan.devices.origin}) and num_nodes={plan.num_nodes.name} ({plan.num_nodes.origin}) ask for more.",
        'Use devices=1, or a strategy for several such as strategy="ddp".',
    )


def _strategy_on_accelerator(plan: Plan) -> Problem | None:
    return _supported("strategy", plan)


def _precision_on_accelerator(plan: Plan) -> Problem | None:
    return _supported("precision", plan)


def _supported(kind: str, plan: Plan) -> Problem | None:
    chosen: Choice[Any] = plan.strategy if kind == "strategy" else plan.precision
    allowed = chosen.value.supported_accelerators
    names = {plan.accelerator.name, plan.accelerator.value.device_type()}
    if allowed is None or names & allowed:
        return None
    return Problem(
        f"{kind}={chosen.name!r} ({chosen.origin}) does not run on accelerator={plan.accelerator.name!r} "
        f"({plan.accelerator.origin}).",
        f"It runs on: {', '.join(sorted(allowed))}.",
        InvalidArgumentError if kind == "strategy" else UsageError,
    )


CHECKS: Final[tuple[Check, ...]] = (
    _single_device_accelerator,
    _too_many_devices,
    _one_of_many,
    _strategy_on_accelerator,
    _precision_on_accelerator,
)


def check_plan(plan: Plan, registry: Registry) -> None:
    """Raise one error for all problems that core and plugins see in the plan."""
    problems = [problem for check in CHECKS if (problem := check(plan)) is not None]
    if registry.has_hook("fabric_validate"):
        for answer in registry.hooks.fabric_validate(plan=plan):
            problems.extend(answer or ())
    if not problems:
        return
    lines = [f"{problem.message} {problem.fix}".strip() for problem in problems]
    if len(problems) == 1:
        raise problems[0].error(lines[0])
    listing = "\n".join(f"  - {line}" for line in lines)
    raise InvalidArgumentError(f"{len(problems)} things in this configuration cannot work:\n{listing}")
