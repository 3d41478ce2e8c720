import copy
import inspect
import threading

import pytest
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from fabric_core.data import capture_constructors
from fabric_core.data.capture import construction_of


class Child(DataLoader):
    def __init__(self, size, scale=1, **kwargs):
        super().__init__(range(size), batch_size=size * scale, **kwargs)
        self.scale = scale


class GrandChild(Child):
    pass


class Mixin:
    def __init__(self, dataset, tag):
        super().__init__(dataset)
        self.tag = tag


class Mixed(Mixin, DataLoader):
    pass


TREE = (DataLoader, BatchSampler, Child, GrandChild, Mixed, Mixin)


def snapshot():
    return [{key: value for key, value in vars(cls).items() if callable(value) or "__" in key} for cls in TREE]


def test_the_arguments_of_the_outermost_constructor_are_noted():
    with capture_constructors():
        noted = construction_of(GrandChild(4, scale=2))
    assert (noted.args, noted.kwargs) == ((4,), {"scale": 2})


def test_a_constructor_from_a_mixin_is_noted():
    with capture_constructors():
        assert construction_of(Mixed(range(3), tag="x")).kwargs == {"tag": "x"}


def test_classes_defined_inside_are_noted_and_restored():
    with capture_constructors():

        class Late(Child):
            def __init__(self, extra):
                super().__init__(2)
                self.extra = extra

        patched = Late.__init__
        assert construction_of(Late("e")).args == ("e",)
    assert Late.__init__ is not patched
    assert construction_of(Late("e")) is None


def test_batch_samplers_are_noted():
    with capture_constructors():
        sampler = BatchSampler(SequentialSampler(range(3)), 2, drop_last=True)
    assert construction_of(sampler).kwargs == {"drop_last": True}


def test_changes_after_construction_are_noted_and_those_during_it_are_not():
    with capture_constructors():
        loader = Child(4)
        assert not construction_of(loader).changed
        loader.first, loader.second = 1, 2
        del loader.first
        list(loader)
    assert list(construction_of(loader).changed) == ["second", "first"]


def test_a_refused_change_is_not_noted():
    with capture_constructors():
        loader = Child(4)
        with pytest.raises(ValueError, match="batch_size"):
            loader.batch_size = 5
        assert not construction_of(loader).changed


def test_nothing_remains_on_the_classes_after_the_block():
    before = snapshot()
    with capture_constructors():
        assert snapshot() != before
    assert snapshot() == before


def test_nothing_remains_on_the_classes_if_the_body_raises():
    before = snapshot()
    with pytest.raises(KeyError), capture_constructors(), capture_constructors():
        raise KeyError
    assert snapshot() == before
    assert construction_of(Child(2)) is None


def test_a_constructor_that_raises_leaves_the_next_one_alone():
    with capture_constructors():
        with pytest.raises(TypeError):
            Child()
        assert construction_of(Child(3)).args == (3,)


def test_the_inner_end_of_nested_blocks_keeps_capturing():
    with capture_constructors():
        with capture_constructors():
            pass
        assert construction_of(Child(3)) is not None


def test_blocks_may_overlap_in_threads():
    before, barrier, seen = snapshot(), threading.Barrier(4), []

    def work():
        barrier.wait()
        for _ in range(50):
            with capture_constructors():
                seen.append(construction_of(Child(3)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(seen) == 200
    assert all(noted.args == (3,) for noted in seen)
    assert snapshot() == before


def test_signatures_look_as_ever_inside():
    before = inspect.signature(Child)
    with capture_constructors():
        assert inspect.signature(Child) == before


def test_a_copy_keeps_the_notes_and_invents_none():
    plain = Child(2)
    with capture_constructors():
        assert construction_of(copy.copy(plain)) is None
        assert construction_of(copy.copy(Child(2))).args == (2,)
