"""How many threads each process of a node computes with."""

from __future__ import annotations

import sys

from fabric_core.cpus import usable_cpus
from fabric_core.settings import OMP_NUM_THREADS


def set_num_threads_if_needed(num_processes: int = 1) -> None:
    """Share the CPUs that this process may use among ``num_processes``, unless ``OMP_NUM_THREADS`` already says how.

    The number is exported for the processes that this one starts. torch is told if it is imported; otherwise it reads
    the variable when it is.
    """
    if OMP_NUM_THREADS.is_set():
        return
    threads = max(1, usable_cpus() // max(1, num_processes))
    OMP_NUM_THREADS.set(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
