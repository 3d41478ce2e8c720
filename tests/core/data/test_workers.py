import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fabric_core.cpus import usable_cpus
from fabric_core.data import (
    auto_worker_init,
    has_iterable_dataset,
    has_len,
    sized_len,
    suggested_max_num_workers,
)
from fabric_core.seeding import seed_everything


class Draws(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        return 3


def drawn(rank, context="fork"):
    seed_everything(1, workers=True, verbose=False)
    loader = DataLoader(Draws(), num_workers=2, batch_size=None, multiprocessing_context=context)
    auto_worker_init(loader, rank=rank)
    return list(loader)


def test_no_two_workers_of_any_two_ranks_draw_the_same_numbers():
    numbers = [number for draw in drawn(0) + drawn(1) for number in draw]
    assert len(set(numbers)) == len(numbers) == 24


def test_workers_draw_the_same_numbers_again_also_when_spawned():
    assert drawn(1) == drawn(1) == drawn(1, context="spawn")


def test_workers_are_left_alone_unless_asked_for():
    loader = DataLoader(range(3))
    auto_worker_init(loader, rank=0)
    assert loader.worker_init_fn is None


def test_the_users_own_function_stays():
    seed_everything(1, workers=True, verbose=False)
    loader = DataLoader(range(3), worker_init_fn=print)
    auto_worker_init(loader, rank=0)
    assert loader.worker_init_fn is print


def test_each_process_leaves_itself_a_cpu():
    assert suggested_max_num_workers(1) == max(1, usable_cpus() - 1)
    assert suggested_max_num_workers(1000) == 1


def test_no_processes_is_an_error():
    with pytest.raises(ValueError, match="local_world_size=0"):
        suggested_max_num_workers(0)


def test_lengths_are_none_where_there_are_none():
    assert sized_len(range(3)) == 3
    assert sized_len(iter([])) is None
    assert has_len(DataLoader(range(3)))
    assert not has_len(iter([]))


def test_streams_are_recognised():
    assert has_iterable_dataset(DataLoader(Stream()))
    assert not has_iterable_dataset(DataLoader(range(3)))


def test_a_loop_over_nothing_is_reported():
    with pytest.warns(UserWarning, match="length 0") as record:
        assert has_len(DataLoader([]))
    assert record[0].filename == __file__


def test_the_length_of_a_stream_is_doubted():
    with pytest.warns(UserWarning, match="own share"):
        assert has_len(DataLoader(Stream()))
