"""The process group of a job: joining, leaving, and the backend for a kind of device."""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.accelerator_of_torch import accelerator_of_torch
from fabric_core.distributed.background import await_background_work
from fabric_core.distributed.exit import protect_exit
from fabric_core.errors import UsageError
from fabric_core.settings import USE_LIBUV

DEFAULT_TIMEOUT: Final = timedelta(minutes=30)
"""How long a collective waits for the other ranks; torch's own figure, ``torch.distributed.default_pg_timeout``."""

_PATIENCE: Final = 10.0
_stores: Final[dict[tuple[int, str, int, bool], Any]] = {}
_left: Final[list[object]] = []


def is_initialized() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def default_backend(device: torch.device) -> str:
    """The backend that torch names for the device, gloo where it names none."""
    return dist.Backend.default_device_backend_map.get(device.type, "gloo")


def carrying_device(device: torch.device) -> torch.device:
    """Where a tensor must be to travel over the default group: on ``device``, if the group takes it from there.

    Gloo takes tensors from the CPU alone; a group without a backend for the CPU takes them from the accelerator.
    """
    backends = dict(part.split(":", 1) for part in dist.get_backend_config().split(","))
    if backends.get(device.type, "gloo") != "gloo":
        return device
    accelerator = None if "cpu" in backends else accelerator_of_torch()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def join_group(
    environment: ClusterEnvironment,
    backend: str,
    timeout: timedelta = DEFAULT_TIMEOUT,
    device: torch.device | None = None,
) -> bool:
    """Join the job's process group; whether it was joined now, and not before by somebody else.

    Every rank calls it. ``device`` binds the group to an indexed device, so that its backend connects eagerly.

    Raises:
        RuntimeError: this build of torch has no ``torch.distributed``, or the process is in a group already that has
            another size or another rank for it.
    """
    if not dist.is_available():
        raise UsageError(
            f"torch {torch.__version__} was built without torch.distributed, which a strategy of several processes "
            "needs. Install a build that has it, or use one device."
        )
    rank, size = environment.global_rank(), environment.world_size()
    if dist.is_initialized():
        _check_existing(rank, size)
        return False
    if sys.platform == "win32" and not USE_LIBUV.is_set():
        USE_LIBUV.set(0)
    await_background_work()
    store = _meet(environment, timeout)
    bound = device if device is not None and device.type != "cpu" and backend != "gloo" else None
    dist.init_process_group(backend, store=store, timeout=timeout, world_size=size, rank=rank, device_id=bound)
    protect_exit()
    return True


def _meet(environment: ClusterEnvironment, timeout: timedelta) -> Any:
    """A store for one group, at rank 0's address.

    What is connected there stays so for the life of the process, and each group gets a part of its own: a rank that
    leaves one group and joins the next must not meet the remains of the first.
    """
    from torch.distributed.rendezvous import rendezvous

    rank, size = environment.global_rank(), environment.world_size()
    address, port = environment.main_address, environment.main_port
    place = (os.getpid(), address, port, rank == 0)  # a forked process has connections of its own
    if place not in _stores:
        if rank != 0:
            _wait_for_listener(address, port)
        where = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
        _stores[place], _, _ = next(iter(rendezvous(where, rank, size, timeout=timeout)))
    # All ranks are in a group before one leaves it: as many as there are ranks arrive for each.
    arrived = _stores[place].add(f"fabric/{size}", 1)
    part = f"fabric/{size}/{(arrived - 1) // size}"
    return dist.PrefixStore(part, _stores[place])  # type: ignore[attr-defined]


def _check_existing(rank: int, size: int) -> None:
    if (dist.get_rank(), dist.get_world_size()) != (rank, size):
        raise UsageError(
            f"This process is rank {dist.get_rank()} of {dist.get_world_size()} in a process group already, but is to "
            f"be rank {rank} of {size} now. Call fabric.teardown() on the Fabric that made the group, or "
            "torch.distributed.destroy_process_group() if you made it, before another is launched."
        )


def _wait_for_listener(address: str, port: int) -> None:
    """Return once somebody listens at rank 0's address, or ``_PATIENCE`` is over.

    torch's own client waits longer after each refused connection, which costs up to a second when rank 0 is a little
    later. The pauses here grow to a tenth of a second, so that many ranks do not flood a host that is late.
    """
    deadline, pause = time.monotonic() + _PATIENCE, 0.005
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
        except (TimeoutError, ConnectionRefusedError):
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 0.1)
        except OSError:
            return  # not resolvable yet, no route: torch's client knows how to insist, and what to say
        else:
            return


def leave_group() -> None:
    """Leave the process group; no error if there is none."""
    if is_initialized():
        # Kept: gloo's destructor waits for a thread, which may wait for the interpreter's lock that it runs under.
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()
