"""Threads of each process."""

import os

import torch

from fabric_core.launchers.threads import set_num_threads_if_needed


def test_cpus_are_shared_among_the_processes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        set_num_threads_if_needed(10_000)
        assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)
    finally:
        torch.set_num_threads(before)


def test_a_number_that_was_given_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    set_num_threads_if_needed(1)
    assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("3", before)
