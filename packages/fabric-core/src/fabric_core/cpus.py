"""How many CPUs this process has."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus() -> int:
    """CPUs that this process may run on, at least 1: not more than its affinity and its container's quota allow.

    The quota is read where a container shows its own (cgroup v2), rounded up; other limits, such as those of cgroup v1
    or of a group further up, are not seen. Where the system tells no affinity, all CPUs of the machine count.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_QUOTA)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(path: Path) -> float | None:
    """CPUs that a file ``cpu.max`` of cgroup v2 grants: microseconds per period; ``None`` without a limit or a file.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, "CPU Interface Files".
    """
    try:
        granted, period = path.read_text(encoding="ascii").split()
        return None if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):  # no such file, or no such format
        return None
