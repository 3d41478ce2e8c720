"""Putting process-wide state back after a test."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fabric_core.rank_zero import rank_zero_only


@contextmanager
def preserved() -> Iterator[None]:
    """Restore environment, rank, random states, default dtype and warning filters, whatever happens inside."""
    environment = dict(os.environ)
    rank = rank_zero_only.rank
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    states = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        rank_zero_only.rank = rank
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
