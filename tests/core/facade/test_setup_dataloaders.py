"""What ``setup_dataloaders`` makes of loaders."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from fabric_core import Fabric
from fabric_core.testing import FakeStrategy
from fabric_core.wrappers import FabricDataLoader


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


@pytest.fixture
def two(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2)
    fabric.launch()
    return fabric


def items(loader):
    return [item for batch in loader for item in batch.tolist()]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


def test_one_loader_comes_back_alone_and_several_as_a_list():
    assert type(cpu().setup_dataloaders(DataLoader([1]))) is FabricDataLoader
    several = cpu().setup_dataloaders(DataLoader([1]), DataLoader([2]))
    assert isinstance(several, list)
    assert [items(loader) for loader in several] == [[1], [2]]


def test_one_process_keeps_the_loader_itself():
    loader = DataLoader(range(4), shuffle=True)
    assert cpu().setup_dataloaders(loader).dataloader is loader


def test_several_processes_share_the_data(two):
    assert items(two.setup_dataloaders(DataLoader(range(6), batch_size=2))) == [0, 2, 4]


def test_sharing_can_be_declined(two):
    loader = DataLoader(range(4))
    assert two.setup_dataloaders(loader, use_distributed_sampler=False).dataloader is loader


def test_a_distributed_sampler_of_the_users_stays(two):
    sampler = DistributedSampler(range(8), num_replicas=4, rank=3, shuffle=False)
    loader = DataLoader(range(8), sampler=sampler)
    assert two.setup_dataloaders(loader).dataloader is loader


def test_a_stream_is_not_divided(two):
    assert items(two.setup_dataloaders(DataLoader(Stream(), batch_size=2))) == [0, 1, 2, 3]


def test_shuffling_survives_and_uses_the_seed(two):
    Fabric.seed_everything(3, verbose=False)
    loader = two.setup_dataloaders(DataLoader(range(20), shuffle=True))
    assert isinstance(loader.sampler, DistributedSampler)
    assert (loader.sampler.shuffle, loader.sampler.seed) == (True, 3)
    assert two.setup_dataloaders(DataLoader(range(20))).sampler.shuffle is False


def test_a_batch_sampler_of_the_users_is_divided_too(two):
    batches = BatchSampler(SequentialSampler(range(8)), batch_size=2, drop_last=False)
    assert items(two.setup_dataloaders(DataLoader(range(8), batch_sampler=batches))) == [0, 2, 4, 6]


def test_batches_move_to_the_device_unless_declined(two):
    two.strategy.devices = [torch.device("meta")] * 2
    loader = DataLoader(torch.arange(4.0))
    assert next(iter(two.setup_dataloaders(loader))).device.type == "meta"
    assert next(iter(two.setup_dataloaders(DataLoader(range(4)), move_to_device=False))).device.type == "cpu"


def test_a_strategy_that_moves_batches_itself_is_left_to_it(fake_backend):
    class Moving(FakeStrategy):
        moves_batches = True

        def process_dataloader(self, dataloader):
            return [torch.tensor([len(dataloader)])]

    fabric = Fabric(accelerator="fake", strategy=Moving(), devices=2)
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(range(6)))
    assert items(loader) == [3]
    assert loader.device is None


def test_workers_are_seeded_if_asked_for():
    Fabric.seed_everything(1, workers=True, verbose=False)
    assert cpu().setup_dataloaders(DataLoader([1])).worker_init_fn is not None
    Fabric.seed_everything(1, workers=False, verbose=False)
    assert cpu().setup_dataloaders(DataLoader([1])).worker_init_fn is None


def test_a_worker_init_function_of_the_users_stays():
    def mine(worker):
        pass

    Fabric.seed_everything(1, workers=True, verbose=False)
    assert cpu().setup_dataloaders(DataLoader([1], worker_init_fn=mine)).worker_init_fn is mine


class Renamed(DataLoader):
    """A loader whose constructor takes other arguments than its base."""

    def __init__(self, numbers, note, **kwargs):
        super().__init__(numbers, batch_size=2, **kwargs)
        self.note = note


def test_a_subclass_made_inside_launch_can_be_divided(two):
    def main(fabric):
        return fabric.setup_dataloaders(Renamed(range(8), "hello"))

    loader = two.launch(main)
    assert items(loader) == [0, 2, 4, 6]
    assert loader.note == "hello"
