"""Which devices of this node, and how many nodes."""

from __future__ import annotations

import torch

from fabric_core.abc.accelerator import Accelerator
from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.rank_zero import rank_zero_info
from fabric_core.resolve.choice import Choice
from fabric_core.resolve.objects import Objects
from fabric_core.resolve.request import Request


def choose_num_nodes(request: Request) -> Choice[int]:
    """The number of nodes, at least 1."""
    value = request.num_nodes.value
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgumentError(
            f"num_nodes={request.num_nodes.value!r} ({request.num_nodes.origin}): expected a whole number of at least "
            "1, as in Fabric(num_nodes=2)."
        )
    return Choice(value, str(value), request.num_nodes.origin)


def choose_devices(
    request: Request, objects: Objects, accelerator: Accelerator, environment: ClusterEnvironment
) -> Choice[list[torch.device]]:
    """One device for each process of this node.

    ``"auto"`` follows the tool that started the processes; else it takes what the accelerator counts.

    Raises:
        TypeError: not a count, indices, a text or ``"auto"``.
        ValueError: none, or some that are not there.
    """
    asked = request.devices
    if objects.devices is not None:
        return _from_strategy(objects.devices.value, objects.devices.origin, accelerator)
    value = asked.value
    if value is None:
        raise InvalidTypeError(
            f'devices=None: expected a count, indices or "auto", for accelerator={accelerator.name()!r}.'
        )
    text = value.strip().lower() if isinstance(value, str) else value
    if text == "auto":
        return _auto(request, accelerator, environment)
    if not isinstance(text, bool) and text in ([], 0, "0", "", "[]", ()):
        raise InvalidArgumentError(
            f"devices={value!r} ({asked.origin}) leaves accelerator={accelerator.name()!r} without a device. "
            'Ask for at least one, or use devices="auto".'
        )
    if isinstance(text, tuple):
        text = list(text)
    devices = accelerator.get_parallel_devices(accelerator.parse_devices(text))
    return Choice(devices, _describe(devices), asked.origin)


def _auto(request: Request, accelerator: Accelerator, environment: ClusterEnvironment) -> Choice[list[torch.device]]:
    origin = request.devices.origin if request.devices.given else "auto"
    started = environment.local_world_size() if environment.creates_processes_externally else None
    count, reason = accelerator.auto_device_count(), f"all that {accelerator.name()} counts"
    if started is not None:
        count, reason = started, f"{type(environment).__name__}: {started} processes run on this node"
    elif (
        request.interactive and accelerator.interactive_devices is not None and count > accelerator.interactive_devices
    ):
        rank_zero_info(
            f"{count} {accelerator.name()} devices are there, but this is an interactive session: using "
            f"{accelerator.interactive_devices}. For more, pass devices=... and strategy='ddp_notebook'."
        )
        count, reason = accelerator.interactive_devices, "an interactive session"
    devices = accelerator.get_parallel_devices(accelerator.parse_devices(count))
    return Choice(devices, _describe(devices), origin, reason)


def _from_strategy(
    devices: list[torch.device] | torch.device, origin: str, accelerator: Accelerator
) -> Choice[list[torch.device]]:
    devices = [devices] if isinstance(devices, torch.device) else list(devices)
    kind = accelerator.device_type()
    wrong = sorted({device.type for device in devices} - {kind})
    if wrong:
        raise InvalidArgumentError(
            f"{origin} names {', '.join(wrong)} devices, but accelerator={accelerator.name()!r} serves {kind}. "
            "Leave one of the two out."
        )
    return Choice(devices, _describe(devices), origin)


def _describe(devices: list[torch.device]) -> str:
    names = [str(device) for device in devices]
    return f"{len(names)} x {names[0]}" if len(set(names)) == 1 and len(names) > 1 else ", ".join(names)
