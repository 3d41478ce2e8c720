import torch
from torch.utils.data import DataLoader, DistributedSampler

from fabric_core.wrappers import FabricDataLoader


def loader():
    data = torch.arange(32)
    return DataLoader(data, batch_size=32, sampler=DistributedSampler(data, num_replicas=1, rank=0, shuffle=True))


def order(batches):
    return next(iter(batches)).tolist()


def expected(epoch):
    plain = loader()
    plain.sampler.set_epoch(epoch)
    return order(plain)


def test_each_iteration_is_the_next_epoch():
    wrapped = FabricDataLoader(loader())
    assert [order(wrapped) for _ in range(3)] == [expected(epoch) for epoch in range(3)]


def test_an_epoch_set_on_the_loader_is_where_counting_goes_on():
    wrapped = FabricDataLoader(loader())
    wrapped.set_epoch(7)
    assert [order(wrapped) for _ in range(2)] == [expected(7), expected(8)]


def test_an_epoch_set_on_the_sampler_as_in_plain_torch_is_respected():
    wrapped = FabricDataLoader(loader())
    seen = []
    for epoch in (5, 6, 9):
        wrapped.sampler.set_epoch(epoch)
        seen.append(order(wrapped))
    assert seen == [expected(5), expected(6), expected(9)]
