"""Putting process-wide state back after a test."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fabric_core.launchers.state import GlobalState
from fabric_core.rank_zero import rank_zero_only


@contextmanager
def preserved() -> Iterator[None]:
    """Restore environment, rank, random states, torch's numerics and warning filters, whatever happens inside."""
    environment = dict(os.environ)
    rank, threads = rank_zero_only.known_rank, torch.get_num_threads()
    state = GlobalState.capture()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        rank_zero_only.rank = rank  # None: to be read from the environment again
        torch.set_num_threads(threads)
        if state is not None:
            state.restore()
