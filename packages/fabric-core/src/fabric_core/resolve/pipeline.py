"""From arguments to a plan: the steps, in the order in which one needs the result of another."""

from __future__ import annotations

from typing import Any

from fabric_core.abc.choosing import ResolveContext
from fabric_core.registry import Registry, get_registry
from fabric_core.resolve.accelerator import choose_accelerator
from fabric_core.resolve.checkpoint_io import choose_checkpoint_io
from fabric_core.resolve.compatibility import check_plan
from fabric_core.resolve.devices import choose_devices, choose_num_nodes
from fabric_core.resolve.environment import choose_environment
from fabric_core.resolve.objects import collect_objects
from fabric_core.resolve.plan import Plan
from fabric_core.resolve.precision import choose_precision
from fabric_core.resolve.request import DEFAULTS, Request, naming
from fabric_core.resolve.strategy import choose_strategy
from fabric_core.warnings import possible_user_warning


def resolve(arguments: dict[str, Any] | None = None, plugins: Any = None, registry: Registry | None = None) -> Plan:
    """Decide everything, from arguments, environment and installed plugins. Touches no device.

    Args:
        arguments: by the names of ``Fabric(...)``; those left out have their default.
        plugins: the ``plugins`` argument.
        registry: where names are looked up; the process-wide one if not given.

    Raises:
        FabricError: whatever cannot work, in one message that names both origins of a conflict.
    """
    registry = registry or get_registry()
    request = Request.gather({**DEFAULTS, **(arguments or {})}, plugins)
    objects = collect_objects(request)
    num_nodes = choose_num_nodes(request)
    known: dict[str, Any] = {
        "num_nodes": num_nodes.value,
        "interactive": request.interactive,
        "requested": {name: getattr(request, name).value for name in DEFAULTS},
    }
    environment = choose_environment(objects, registry, ResolveContext(**known))
    known["environment"] = environment.name
    with naming(request.accelerator):
        accelerator = choose_accelerator(request, objects, registry, ResolveContext(**known))
    known["accelerator"] = accelerator.name
    with naming(request.devices):
        devices = choose_devices(request, objects, accelerator.value, environment.value)
    known["num_devices"] = len(devices.value)
    with naming(request.strategy):
        strategy = choose_strategy(request, accelerator.value, registry, ResolveContext(**known))
    known["strategy"] = strategy.name
    with naming(request.precision):
        precision = choose_precision(
            request, objects, strategy.value, accelerator.value, registry, ResolveContext(**known)
        )
    io = choose_checkpoint_io(request, objects, registry)
    plan = Plan(environment, accelerator, devices, num_nodes, strategy, precision, io, request.interactive)
    check_plan(plan, registry)
    if strategy.value.multiple_devices:
        environment.value.validate_settings(len(devices.value), num_nodes.value)
    else:
        _warn_of_strangers(plan)
    return plan


def _warn_of_strangers(plan: Plan) -> None:
    """Several processes were started, and the strategy makes each of them a job of its own."""
    environment = plan.environment.value
    if environment.creates_processes_externally and environment.world_size() > 1:
        possible_user_warning(
            f"{environment.world_size()} processes were started, but strategy={plan.strategy.name!r} on one device "
            "makes each a job of its own: every one is rank 0 and writes the checkpoints. For one job leave devices "
            'out, or use strategy="ddp".'
        )
