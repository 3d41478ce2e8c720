"""Passing on no more keywords than a callable takes: what was written for an older core keeps working."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

_Names: TypeAlias = "frozenset[str] | None"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_read: WeakKeyDictionary[FunctionType | type, dict[bool, _Names]] = WeakKeyDictionary()


def accepted(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of ``keywords`` that ``function`` takes; all of them if it takes any, or does not tell."""
    if not keywords:
        return keywords
    names = _names(function)
    return keywords if names is None else {name: value for name, value in keywords.items() if name in names}


def _names(function: Callable[..., Any]) -> _Names:
    # A method is a new object at each access, and would keep its object alive here; its function is neither.
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, FunctionType | type):
        return _names_in_signature(function)
    known = _read.setdefault(plain, {})
    bound = plain is not function  # its first parameter is taken
    if bound not in known:
        known[bound] = _names_in_signature(function)
    return known[bound]


def _names_in_signature(function: Callable[..., Any]) -> _Names:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C show no signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD)
