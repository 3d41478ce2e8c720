"""Keywords that a callable takes."""

import gc
import weakref

import pytest

from fabric_core.keywords import accepted

ALL = {"a": 1, "b": 2}


class Owner:
    def method(self, a, /, b): ...

    @classmethod
    def of_class(cls, b): ...

    def __call__(self, b): ...


def any_name(**names): ...


@pytest.mark.parametrize("function", [Owner().method, Owner.of_class, Owner(), Owner.method, lambda *, b: b])
def test_only_names_that_can_be_keywords_are_passed(function):
    assert accepted(function, ALL) == accepted(function, ALL) == {"b": 2}


@pytest.mark.parametrize("function", [any_name, lambda c, **names: c, dict, "text".format])
def test_all_are_passed_where_any_are_taken(function):
    assert accepted(function, ALL) == ALL


def test_the_first_parameter_of_a_method_is_taken():
    class Other:
        def method(a, b): ...

    assert accepted(Other().method, ALL) == {"b": 2}
    assert accepted(Other.method, ALL) == ALL


def test_an_object_whose_method_was_asked_about_can_go():
    owner = Owner()
    gone = weakref.ref(owner)
    accepted(owner.method, ALL)
    del owner
    gc.collect()
    assert gone() is None
