"""``torch.nn.Linear`` making other layers for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from fabric_bnb.linear import PLAIN

_NAME = PLAIN.__name__


class _StandIn(type):
    """The type of what stands at the name ``Linear``: calling it makes another layer, all else is ``nn.Linear``'s.

    So ``isinstance(layer, nn.Linear)`` and ``nn.Linear.__init__(self, ...)`` in code that runs meanwhile mean what they
    always mean; ``type(layer) is nn.Linear`` does not. A subclass that such code defines is a subclass of ``nn.Linear``
    and makes itself.
    """

    make: Callable[..., nn.Module] | None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        make = vars(cls).get("make")
        if make is not None:
            return make(*args, **kwargs)
        return PLAIN(*args, **kwargs) if "make" in vars(cls) else super().__call__(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, PLAIN) if "make" in vars(cls) else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, PLAIN) if "make" in vars(cls) else super().__subclasscheck__(subclass)


def _new(cls: type, *_: Any, **__: Any) -> Any:
    """``__new__`` of a stand-in, by which layers are unpickled: they are torch's own."""
    return object.__new__(PLAIN if "make" in vars(cls) else cls)


class LinearReplaced:
    """Inside the ``with`` block, ``torch.nn.Linear(...)`` returns what ``make`` returns for the same arguments.

    It holds for every module that has the class under its own name, ``from torch.nn import Linear`` included, and for
    those imported inside the block; under a name of its own (``import Linear as Dense``) it stays what it is. What was
    there comes back at the end, whatever is raised inside. Blocks may be nested; the innermost counts.

    Inside, modules with plain linear layers can be copied and unpickled, but not pickled: ``pickle`` and ``torch.save``
    look the class up by its name, and find another one there. What is asked for by ``nn.Linear`` as a key, or compared
    with ``is``, is not torch's class either. Pickle, and look up, outside of the block.

    Args:
        make: takes what ``torch.nn.Linear`` takes.
    """

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        self._make = make
        self._entered: list[tuple[Any, list[tuple[ModuleType, Any]]]] = []

    def __enter__(self) -> None:
        names = {"make": staticmethod(self._make), "__new__": _new, "__module__": PLAIN.__module__}
        stand_in = _StandIn(_NAME, (PLAIN,), names)
        replaced = [(module, found) for module in _modules() if is_linear(found := vars(module).get(_NAME))]
        self._entered.append((stand_in, replaced))
        for module, _ in replaced:
            setattr(module, _NAME, stand_in)

    def __exit__(self, *_: object) -> None:
        stand_in, replaced = self._entered.pop()
        for module in _modules():  # those imported meanwhile as well
            if vars(module).get(_NAME) is stand_in:
                setattr(module, _NAME, PLAIN)
        for module, previous in replaced:
            setattr(module, _NAME, previous)
        stand_in.make = None  # where somebody kept it under another name, it is torch's class again


def is_linear(found: object) -> bool:
    """Whether it is ``torch.nn.Linear``, or stands in its place now."""
    return found is PLAIN or (type(found) is _StandIn and "make" in vars(found))


def _modules() -> list[ModuleType]:
    """Modules whose names may be changed: not those of this package, which mean torch's own class."""
    own = __name__.partition(".")[0]
    return [m for name, m in list(sys.modules.items()) if type(m) is ModuleType and name.partition(".")[0] != own]
