import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from fabric_core.data import DistributedSamplerWrapper, distributed_loader, set_sampler_epoch
from fabric_core.errors import InvalidTypeError
from fabric_core.settings import GLOBAL_SEED


def items(loader):
    return [item for batch in loader for item in batch.tolist()]


def shares(make, ranks=2, **options):
    return [items(distributed_loader(make(), num_replicas=ranks, rank=rank, **options)) for rank in range(ranks)]


class Sized:
    def __init__(self, items, length):
        self.items, self.length, self.epoch = items, length, None

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch


class Backwards(SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self)))


def test_data_in_order_stays_in_order():
    assert shares(lambda: DataLoader(range(6), batch_size=2)) == [[0, 2, 4], [1, 3, 5]]


def test_shuffled_data_stays_shuffled_and_together_is_complete():
    one, two = shares(lambda: DataLoader(range(40), shuffle=True))
    assert sorted(one + two) == list(range(40))
    assert one != sorted(one)


def test_the_order_depends_on_the_seed_and_the_epoch_only():
    def order(seed, epoch):
        GLOBAL_SEED.set(seed)
        torch.manual_seed(torch.seed())
        loader = distributed_loader(DataLoader(range(40), shuffle=True), num_replicas=2, rank=0)
        set_sampler_epoch(loader, epoch)
        return items(loader)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)


def test_options_for_the_sampler_win():
    assert shares(lambda: DataLoader(range(5)), drop_last=True) == [[0, 2], [1, 3]]
    loader = distributed_loader(DataLoader(range(5)), num_replicas=2, rank=0, seed=9, shuffle=True)
    assert (loader.sampler.seed, loader.sampler.shuffle) == (9, True)


def test_streams_and_divided_loaders_come_back_as_they_are():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(4))

    divided = DistributedSampler(range(4), num_replicas=2, rank=0)
    batches = BatchSampler(divided, 2, drop_last=False)
    for loader in (
        DataLoader(Stream()),
        DataLoader(range(4), sampler=divided),
        DataLoader(range(4), batch_sampler=batches),
    ):
        assert distributed_loader(loader, num_replicas=2, rank=0) is loader


def test_random_order_inside_a_batch_sampler_stays_random():
    loader = DataLoader(range(8), batch_sampler=BatchSampler(RandomSampler(range(8)), 2, drop_last=False))
    assert distributed_loader(loader, num_replicas=2, rank=0).sampler.shuffle


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Backwards(range(4)), [[3, 1], [2, 0]]),
        (SequentialSampler(range(2)), [[0], [1]]),
        ([3, 2, 1], [[3, 1], [2, 3]]),
    ],
)
def test_what_a_sampler_of_ones_own_yields_is_divided(sampler, expected):
    assert shares(lambda: DataLoader(range(4), sampler=sampler)) == expected


def test_drawing_with_replacement_survives():
    one, two = shares(lambda: DataLoader(range(3), sampler=RandomSampler(range(3), replacement=True, num_samples=30)))
    assert len(one) == len(two) == 15


def test_ranks_agree_although_their_generators_differ():
    def pass_of(rank):
        torch.manual_seed(rank)
        sampler = WeightedRandomSampler([1.0] * 100, 100, replacement=False)
        loader = distributed_loader(DataLoader(range(100), sampler=sampler), num_replicas=2, rank=rank)
        return items(loader)

    assert sorted(pass_of(0) + pass_of(1)) == list(range(100))


def test_dividing_a_sampler_draws_nothing_from_the_global_generators():
    sampler = DistributedSamplerWrapper(RandomSampler(range(9)), num_replicas=2, rank=0)
    before = torch.get_rng_state()
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_wrapper_makes_a_new_pass_each_time_and_passes_the_epoch_on():
    inner = Sized([1, 2], 2)
    sampler = DistributedSamplerWrapper(inner, num_replicas=1, rank=0)
    assert list(sampler) == [1, 2]
    inner.items = [5, 6]
    sampler.set_epoch(4)
    assert (list(sampler), inner.epoch, len(sampler)) == ([5, 6], 4, 2)


@pytest.mark.parametrize(("drop_last", "expected"), [(False, [[0, 3], [1, 4], [2, 0]]), (True, [[0], [1], [2]])])
def test_the_wrapper_fills_up_or_drops_the_last(drop_last, expected):
    make = [DistributedSamplerWrapper(range(5), num_replicas=3, rank=r, drop_last=drop_last) for r in range(3)]
    assert [list(sampler) for sampler in make] == expected
    assert [len(sampler) for sampler in make] == [len(share) for share in expected]


def test_few_items_are_repeated_for_many_ranks():
    assert [list(DistributedSamplerWrapper([7], num_replicas=3, rank=r)) for r in range(3)] == [[7], [7], [7]]
    assert list(DistributedSamplerWrapper([], num_replicas=3, rank=0)) == []


@pytest.mark.parametrize("sampler", [iter([1, 2]), Sized([], float("inf"))])
def test_a_sampler_without_a_finite_length_is_an_error(sampler):
    with pytest.raises(InvalidTypeError, match=r"finite length.*use_distributed_sampler=False"):
        DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)


def test_a_sampler_longer_than_its_length_is_an_error():
    with pytest.raises(InvalidTypeError, match="correct its __len__"):
        list(DistributedSamplerWrapper(Sized(iter(int, 1), 3), num_replicas=2, rank=0))


def test_only_loaders_can_be_divided():
    with pytest.raises(InvalidTypeError, match=r"torch\.utils\.data\.DataLoader, got list"):
        distributed_loader([1, 2], num_replicas=2, rank=0)


def test_the_epoch_is_set_once_on_each_sampler():
    calls = []

    class Batches(BatchSampler):
        def set_epoch(self, epoch):
            calls.append(("batches", epoch))

    class Indices(SequentialSampler):
        def set_epoch(self, epoch):
            calls.append(("indices", epoch))

    set_sampler_epoch(DataLoader(range(4), sampler=Indices(range(4))), 1)
    set_sampler_epoch(DataLoader(range(4), batch_sampler=Batches(Indices(range(4)), 2, False)), 2)
    assert calls == [("indices", 1), ("batches", 2), ("indices", 2)]
    set_sampler_epoch(DataLoader(range(4)), 3)
    set_sampler_epoch(object(), 3)
