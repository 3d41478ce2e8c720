"""Which arguments of a constructor a caller really typed, while the defaults stay in the signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Init = TypeVar("Init", bound=Callable[..., None])


def remember_typed(init: Init) -> Init:
    """Decorate ``__init__``: before it runs, ``self.typed_arguments`` holds the names that were typed.

    The signature, its defaults and its types stay visible. A subclass that calls ``super().__init__(stage=3)``
    counts as having typed ``stage``.
    """

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        self.typed_arguments = typed_names(init, args, kwargs)
        init(self, *args, **kwargs)

    return remembering  # type: ignore[return-value]  # it takes exactly what init takes


def typed_names(init: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The names of the parameters that these arguments bind to; ``args`` without ``self``."""
    positional = list(inspect.signature(init).parameters)[1 : len(args) + 1]
    return frozenset(positional) | frozenset(kwargs)
