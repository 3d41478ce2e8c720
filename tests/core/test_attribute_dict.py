import pytest

from fabric_core.attribute_dict import AttributeDict


def test_items_are_attributes():
    d = AttributeDict(a=1)
    d.b = 2
    del d.a
    assert (d, d.b, d["b"]) == ({"b": 2}, 2, 2)


@pytest.mark.parametrize("access", [getattr, delattr])
def test_a_missing_item_is_an_attribute_error(access):
    with pytest.raises(AttributeError, match="no item 'c'; it has: a, b"):
        access(AttributeDict(b=1, a=2), "c")


def test_items_print_sorted_and_nothing_prints_as_nothing():
    assert repr(AttributeDict(lr=0.1, batch="x")) == '"batch": \'x\'\n"lr":    0.1'
    assert repr(AttributeDict()) == ""
