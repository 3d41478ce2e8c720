"""The kit for tests puts back what a test changed."""

import contextlib
import random

import numpy
import torch

from fabric_core.rank_zero import rank_zero_only
from fabric_core.testing import WorkerPool, preserved


def drawn():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_random_states_are_put_back_also_after_an_error():
    seen = []
    with contextlib.suppress(ValueError), preserved():
        seen += drawn()
        raise ValueError
    with preserved():
        assert [*drawn()] == seen


def test_a_rank_that_was_not_known_is_not_known_afterwards(monkeypatch):
    rank_zero_only.rank = None
    with preserved():
        assert rank_zero_only.rank == 0
    assert rank_zero_only.known_rank is None
    monkeypatch.setenv("RANK", "3")
    assert rank_zero_only.rank == 3


def test_numerics_are_put_back():
    with preserved():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("medium")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def one():
    return 1


def test_a_stopped_pool_gives_its_port_back():
    pool = WorkerPool(1)
    assert pool.run(one) == [1]
    reserved = pool._port
    pool.stop()
    assert reserved._socket.fileno() == -1
