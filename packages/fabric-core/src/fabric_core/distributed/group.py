"""The process group of a job: joining, leaving, and the backend for a kind of device."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.distributed.exit import protect_exit
from fabric_core.errors import UsageError

DEFAULT_TIMEOUT: Final = timedelta(minutes=30)
"""How long a collective waits for the other ranks; torch's own figure, ``torch.distributed.default_pg_timeout``."""


def is_initialized() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def default_backend(device: torch.device) -> str:
    """The backend that torch names for the device, gloo where it names none."""
    return dist.Backend.default_device_backend_map.get(device.type, "gloo")


def join_group(
    environment: ClusterEnvironment,
    backend: str,
    timeout: timedelta = DEFAULT_TIMEOUT,
    device: torch.device | None = None,
) -> None:
    """Join the job's process group, or return at once if this process is in one already.

    Every rank calls it. ``device`` binds the group to an indexed device, so that its backend connects eagerly.

    Raises:
        RuntimeError: this build of torch has no ``torch.distributed``.
    """
    if not dist.is_available():
        raise UsageError(
            f"torch {torch.__version__} was built without torch.distributed, which a strategy of several processes "
            "needs. Install a build that has it, or use one device."
        )
    if dist.is_initialized():
        return
    address = environment.main_address
    host = f"[{address}]" if ":" in address else address
    bound = device if device is not None and device.type != "cpu" and backend != "gloo" else None
    if environment.global_rank() != 0:
        _wait_for_listener(address, environment.main_port, timeout)
    dist.init_process_group(
        backend,
        init_method=f"tcp://{host}:{environment.main_port}",
        timeout=timeout,
        world_size=environment.world_size(),
        rank=environment.global_rank(),
        device_id=bound,
    )
    protect_exit()


def _wait_for_listener(address: str, port: int, timeout: timedelta) -> None:
    """Return once somebody listens at rank 0's address, or the time is up.

    torch's own client waits longer after each refused connection, which costs up to a second when rank 0 is a little
    later; asking every few milliseconds costs nothing to speak of.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
        except TimeoutError:
            continue
        except ConnectionRefusedError:
            time.sleep(0.005)
        except OSError:
            return  # not resolvable yet, no route: torch's client knows how to insist, and what to say
        else:
            return


def leave_group() -> None:
    """Leave the process group; no error if there is none."""
    if is_initialized():
        dist.destroy_process_group()
