"""The wrapped data loader: batches where they belong, epochs counted, all else the user's loader."""

import itertools
import pickle
from collections import namedtuple

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler

from fabric_core import Fabric
from fabric_core.wrappers import FabricDataLoader

META = torch.device("meta")
Point = namedtuple("Point", "x label")


class Numbered(Sampler):
    """Remembers the epochs it was told."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        return 3


def cpu():
    return Fabric(accelerator="cpu", devices=1)


def test_it_is_an_instance_of_what_it_wraps():
    class Mine(DataLoader):
        pass

    loader = cpu().setup_dataloaders(Mine([1]))
    assert isinstance(loader, Mine)
    assert isinstance(loader, DataLoader)
    assert type(loader) is FabricDataLoader


def test_attributes_and_length_are_the_loaders():
    inner = DataLoader(range(10), batch_size=4, drop_last=True)
    loader = cpu().setup_dataloaders(inner)
    assert (loader.batch_size, loader.drop_last, len(loader)) == (4, True, 2)
    assert loader.dataset == range(10)
    assert loader.sampler is inner.sampler
    assert not hasattr(loader, "absent")


def test_assignments_reach_the_loader_inside():
    loader = cpu().setup_dataloaders(DataLoader(range(4)))
    loader.collate_fn = lambda items: "mine"
    assert list(loader) == ["mine"] * 4
    loader.note = "kept"
    assert loader.dataloader.note == "kept"
    del loader.note
    assert not hasattr(loader.dataloader, "note")


def test_every_iteration_is_the_samplers_next_epoch():
    sampler = Numbered()
    loader = cpu().setup_dataloaders(DataLoader(range(3), sampler=sampler))
    for _ in range(3):
        list(loader)
    assert sampler.epochs == [0, 1, 2]


def test_an_iteration_left_early_counts():
    sampler = Numbered()
    loader = cpu().setup_dataloaders(DataLoader(range(3), sampler=sampler))
    next(iter(loader))
    next(iter(loader))
    assert sampler.epochs == [0, 1]


def test_the_sampler_inside_a_batch_sampler_is_told():
    sampler = Numbered()
    list(cpu().setup_dataloaders(DataLoader(range(3), batch_sampler=BatchSampler(sampler, 2, False))))
    assert sampler.epochs == [0]


def test_a_resumed_run_names_its_epoch():
    sampler = Numbered()
    loader = cpu().setup_dataloaders(DataLoader(range(3), sampler=sampler))
    loader.set_epoch(7)
    list(loader)
    list(loader)
    assert sampler.epochs == [7, 8]


def test_epochs_of_a_divided_loader_are_shuffled_anew(fake_backend):
    fabric = Fabric(accelerator="fake", strategy="fake", devices=2)
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(range(40), shuffle=True))
    first, second = ([int(x) for x in loader] for _ in range(2))
    assert first != second
    loader.set_epoch(0)
    assert [int(x) for x in loader] == first


def test_two_iterations_at_once_do_not_disturb_each_other():
    loader = cpu().setup_dataloaders(DataLoader(range(3)))
    assert [(int(a), int(b)) for a, b in zip(loader, loader, strict=True)] == [(0, 0), (1, 1), (2, 2)]


def test_batches_of_every_kind_move():
    batches = [
        torch.ones(2),
        [torch.ones(2), "text"],
        {"x": torch.ones(2), "n": 3},
        Point(torch.ones(2), label=None),
        (torch.ones(1), {"deep": [torch.ones(1)]}),
    ]
    tensor, items, mapping, point, deep = FabricDataLoader(batches, META)
    assert tensor.device == items[0].device == mapping["x"].device == point.x.device == META
    assert deep[1]["deep"][0].device == META
    assert (items[1], mapping["n"], point.label, type(point)) == ("text", 3, None, Point)


def test_batches_stay_where_they_are_without_a_device():
    batches = [torch.ones(2)]
    assert next(iter(FabricDataLoader(batches))) is batches[0]
    assert FabricDataLoader(batches).device is None


def test_the_loaders_own_batches_are_not_changed():
    batch = {"x": torch.ones(2)}
    next(iter(FabricDataLoader([batch], META)))
    assert batch["x"].device.type == "cpu"


def test_a_stream_has_no_length_and_can_be_endless():
    class Stream(IterableDataset):
        def __iter__(self):
            return itertools.count()

    loader = cpu().setup_dataloaders(DataLoader(Stream(), batch_size=2))
    with pytest.raises(TypeError, match="has no len"):
        len(loader)
    assert next(iter(loader)).tolist() == [0, 1]


def test_a_seeded_generator_decides_the_order():
    def order():
        generator = torch.Generator().manual_seed(3)
        sampler = RandomSampler(range(20), generator=generator)
        return [int(x) for x in cpu().setup_dataloaders(DataLoader(range(20), sampler=sampler))]

    assert order() == order()


def test_pickling_keeps_the_place_and_the_epoch():
    loader = FabricDataLoader(DataLoader(range(3), sampler=Numbered()), META)
    list(loader)
    twin = pickle.loads(pickle.dumps(loader))
    assert twin.device == META
    list(twin)
    assert twin.sampler.epochs == [0, 1]


def test_the_samplers_own_set_epoch_counts():
    loader = cpu().setup_dataloaders(DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 0)))
    epochs = []
    for epoch in (0, 1, 5):
        loader.sampler.set_epoch(epoch)
        list(loader)
        epochs.append(loader.sampler.epoch)
    list(loader)
    assert [*epochs, loader.sampler.epoch] == [0, 1, 5, 6]


def test_a_pickled_loader_goes_on_with_the_next_epoch():
    loader = cpu().setup_dataloaders(DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 0)))
    for _ in range(3):
        list(loader)
    twin = pickle.loads(pickle.dumps(loader))
    list(twin)
    assert twin.sampler.epoch == 3


def test_workers_feed_it():
    loader = cpu().setup_dataloaders(DataLoader(range(6), batch_size=2, num_workers=1))
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
