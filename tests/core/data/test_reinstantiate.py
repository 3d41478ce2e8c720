import inspect
import multiprocessing
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset

from fabric_core.data import capture_constructors, reinstantiate
from fabric_core.errors import InvalidTypeError, MisconfigurationException
from fabric_core.warnings import PossibleUserWarning

SAMPLER = [3, 1, 2]
OPT_OUT = "use_distributed_sampler=False"
captured = pytest.mark.parametrize("capture", [capture_constructors, nullcontext], ids=["captured", "inferred"])


def rows(loader):
    return [batch.tolist() for batch in loader]


class Stored(DataLoader):
    def __init__(self, dataset, factor, *args, label="none", **kwargs):
        super().__init__(dataset, *args, **kwargs)
        self.factor, self.label = factor, label


class Forgetful(DataLoader):
    def __init__(self, name, size, **kwargs):
        super().__init__(range(size), **kwargs)


class PassingOn(DataLoader):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Closed(DataLoader):
    def __init__(self, dataset):
        super().__init__(dataset)


class Shuffling(DataLoader):
    def __init__(self, dataset, **kwargs):
        super().__init__(dataset, shuffle=True, **kwargs)


class Pairs(BatchSampler):
    def __init__(self, sampler, tag):
        super().__init__(sampler, 2, drop_last=False)
        self.tag = tag


class Secretive(BatchSampler):
    def __init__(self, sampler, secret):
        super().__init__(sampler, 2, drop_last=False)


class Nameless(BatchSampler):
    def __init__(self, dataset):
        super().__init__(SequentialSampler(dataset), 2, drop_last=False)


class LookAlike:
    def __init__(self, indices, size, drop):
        self.indices, self.batch_size, self.drop_last = indices, size, drop

    def __iter__(self):
        return iter([list(self.indices)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def collate(samples):
    return torch.tensor(samples)


def init_worker(worker_id):
    pass


ARGUMENTS = {
    "batch_size": 2,
    "num_workers": 1,
    "collate_fn": collate,
    "pin_memory": True,
    "drop_last": True,
    "timeout": 7,
    "worker_init_fn": init_worker,
    "multiprocessing_context": multiprocessing.get_context("spawn"),
    "generator": torch.Generator(),
    "prefetch_factor": 5,
    "persistent_workers": True,
    "pin_memory_device": "",
    "in_order": False,
}


@captured
@pytest.mark.parametrize("name", sorted(inspect.signature(DataLoader.__init__).parameters.keys() - {"self"}))
def test_every_argument_of_a_loader_is_preserved(name, capture):
    dataset = range(4)
    with capture():
        loader = DataLoader(dataset, **ARGUMENTS)
    new = reinstantiate(loader, SAMPLER)
    if name in ("shuffle", "batch_sampler"):
        assert new.batch_sampler.sampler is new.sampler
    else:
        assert getattr(new, name) == (ARGUMENTS | {"dataset": dataset, "sampler": SAMPLER})[name]


@captured
def test_the_new_loader_draws_from_the_sampler_and_the_old_one_stays(capture):
    with capture():
        loader = DataLoader(range(4), batch_size=2, shuffle=True)
    assert rows(reinstantiate(loader, SAMPLER)) == [[3, 1], [2]]
    assert len(loader.sampler) == 4


@captured
def test_a_loader_without_batches_stays_without(capture):
    with capture():
        loader = DataLoader(range(4), batch_size=None)
    assert list(reinstantiate(loader, SAMPLER)) == SAMPLER


@captured
def test_a_subclass_keeps_its_class_and_arguments(capture):
    with capture():
        loader = Stored(range(4), 2.5, batch_size=2, label="x")
    new = reinstantiate(loader, SAMPLER)
    assert (type(new), new.factor, new.label, rows(new)) == (Stored, 2.5, "x", [[3, 1], [2]])


def test_arguments_that_no_attribute_keeps_are_captured():
    with capture_constructors():
        loader = Forgetful("n", 4, batch_size=3)
    assert rows(reinstantiate(loader, SAMPLER)) == [[3, 1, 2]]


def test_arguments_that_no_attribute_keeps_are_an_error_otherwise():
    with pytest.raises(MisconfigurationException, match=r"`name`, `size`.*self.name = name.*" + OPT_OUT):
        reinstantiate(Forgetful("n", 4), SAMPLER)


def test_positional_arguments_handed_on_are_understood():
    with capture_constructors():
        loader = PassingOn(range(4), 2, True)
    assert rows(reinstantiate(loader, SAMPLER)) == [[3, 1], [2]]


def test_positional_only_arguments_stay_positional():
    class Positional(DataLoader):
        def __init__(self, dataset, /, **kwargs):
            super().__init__(dataset, **kwargs)

    assert rows(reinstantiate(Positional(range(4), batch_size=2), SAMPLER)) == [[3, 1], [2]]


def test_a_constructor_without_the_parameter_is_an_error():
    with pytest.raises(InvalidTypeError, match=r"`sampler`.*\*\*kwargs.*" + OPT_OUT):
        reinstantiate(Closed(range(4)), SAMPLER)


def test_a_constructor_that_fixes_the_order_is_an_error():
    with pytest.raises(MisconfigurationException, match=r"Shuffling.*shuffle.*" + OPT_OUT):
        reinstantiate(Shuffling(range(4)), SAMPLER)


def test_a_constructor_that_swallows_the_sampler_is_reported():
    class Swallowing(DataLoader):
        def __init__(self, dataset, sampler=None):
            super().__init__(dataset)

    with pytest.warns(PossibleUserWarning, match="does not seem to use"):
        reinstantiate(Swallowing(range(4)), SAMPLER)


@captured
def test_attributes_set_later_are_carried_over(capture):
    with capture():
        loader = DataLoader(range(4), batch_size=2)
        loader.note, loader.num_workers = "mine", 0
        loader.timeout = 3
        del loader.in_order
        loader.in_order = False
    new = reinstantiate(loader, SAMPLER)
    assert (new.note, new.timeout, new.in_order) == ("mine", 3, False)


def test_attributes_deleted_later_are_deleted():
    with capture_constructors():
        loader = Stored(range(4), 1)
        del loader.factor
    assert not hasattr(reinstantiate(loader, SAMPLER), "factor")


def test_running_workers_are_not_carried_over():
    with capture_constructors():
        loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
        list(loader)
    new = reinstantiate(loader, SAMPLER)
    assert new._iterator is None
    assert rows(new) == [[3], [1], [2]]


@captured
def test_a_plain_batch_sampler_turns_into_arguments(capture):
    with capture():
        loader = DataLoader(range(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 2, drop_last=True))
    assert rows(reinstantiate(loader, SAMPLER)) == [[3, 1]]


@captured
def test_a_batch_sampler_of_ones_own_is_rebuilt_around_the_sampler(capture):
    with capture():
        loader = DataLoader(range(4), batch_sampler=Pairs(SequentialSampler(range(4)), tag="t"), num_workers=1)
    new = reinstantiate(loader, SAMPLER)
    assert (type(new.batch_sampler), new.batch_sampler.tag, new.num_workers) == (Pairs, "t", 1)
    assert rows(new) == [[3, 1], [2]]


def test_changes_to_a_batch_sampler_are_repeated():
    with capture_constructors():
        batch_sampler = Secretive(SequentialSampler(range(4)), "s")
        batch_sampler.batch_size = 3
        batch_sampler.sampler = SequentialSampler(range(2))
        loader = DataLoader(range(4), batch_sampler=batch_sampler)
    assert rows(reinstantiate(loader, SAMPLER)) == [[3, 1, 2]]


def test_a_batch_sampler_that_looks_like_torchs_is_tried():
    loader = DataLoader(range(4), batch_sampler=LookAlike(range(4), 2, False))
    with pytest.warns(PossibleUserWarning, match="does not seem to use"):  # it hides its sampler
        new = reinstantiate(loader, SAMPLER)
    assert rows(new) == [[3, 1, 2]]


@pytest.mark.parametrize("batch_sampler", [Nameless(range(4)), [[0, 1], [2]], [[0], [1]].__iter__()])
def test_a_batch_sampler_that_takes_no_sampler_is_an_error(batch_sampler):
    with pytest.raises(InvalidTypeError, match=OPT_OUT):
        reinstantiate(DataLoader(range(4), batch_sampler=batch_sampler), SAMPLER)


def test_a_batch_sampler_with_unknown_arguments_is_tried_with_those_of_torch():
    loader = DataLoader(range(4), batch_sampler=Secretive(SequentialSampler(range(4)), "s"))
    with pytest.raises(InvalidTypeError, match=r"Secretive.*\(sampler, batch_size, drop_last\).*" + OPT_OUT):
        reinstantiate(loader, SAMPLER)


def test_an_error_of_the_constructor_itself_passes():
    class Once(DataLoader):
        def __init__(self, dataset, sampler=None):
            if sampler is not None:
                raise ValueError("never again")
            super().__init__(dataset)

    with pytest.raises(ValueError, match="never again"):
        reinstantiate(Once(range(4)), SAMPLER)


def test_a_captured_batch_sampler_that_takes_no_sampler_is_an_error():
    with capture_constructors():
        loader = DataLoader(range(4), batch_sampler=Nameless(range(4)))
    with pytest.raises(InvalidTypeError, match=r"Nameless.*`sampler`.*" + OPT_OUT):
        reinstantiate(loader, SAMPLER)


@captured
def test_a_stream_keeps_its_arguments_and_gets_no_sampler(capture):
    with capture():
        loader = DataLoader(Stream(), batch_size=2, drop_last=True)
    assert rows(reinstantiate(loader, SAMPLER)) == [[0, 1]]


def test_a_loader_that_takes_a_sampler_only_makes_its_own_batches():
    class Batching(DataLoader):
        def __init__(self, dataset, sampler=None):
            super().__init__(dataset, batch_sampler=Pairs(sampler or SequentialSampler(dataset), "t"))

    assert rows(reinstantiate(Batching(range(4)), SAMPLER)) == [[3, 1], [2]]


def test_other_objects_are_refused():
    with pytest.raises(InvalidTypeError, match=r"torch\.utils\.data\.DataLoader, got Subset"):
        reinstantiate(Subset(range(3), [0]), SAMPLER)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # by torchdata, with every loader
@captured
def test_a_stateful_loader_keeps_its_options(capture):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    with capture():
        loader = stateful.StatefulDataLoader(range(4), batch_size=2, shuffle=True, snapshot_every_n_steps=3)
    new = reinstantiate(loader, SAMPLER)
    assert (type(new), new.snapshot_every_n_steps) == (stateful.StatefulDataLoader, 3)
    assert rows(new) == [[3, 1], [2]]
