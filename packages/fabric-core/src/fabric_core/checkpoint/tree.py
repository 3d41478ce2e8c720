"""Walking through nested plain containers, as checkpoints are made of."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

# What safe loading gives back as it was. Other containers (frozenset, defaultdict, deque) it refuses.
_MAPPINGS: Final = (dict, OrderedDict, Counter)
_SEQUENCES: Final = (list, tuple, set, torch.Size)
SAFE_LEAVES: Final = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, bytearray),
        *(torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device, torch.layout),
    }
)
"""The types, beside containers, that safe loading reads back without being told so."""


def leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All that is no plain container in ``tree``, keys included, each with its place, as ``state['args'][0]``."""
    stack, seen = [(name, tree)], set[int]()
    while stack:
        name, node = stack.pop()
        kind = type(node)
        if kind not in _MAPPINGS and kind not in _SEQUENCES:
            yield name, node
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        if kind in _MAPPINGS:
            stack.extend((f"a key of {name}", key) for key in node if type(key) is not str)
            stack.extend((f"{name}[{key!r}]", value) for key, value in node.items())
            # A module's state carries its version numbers as an attribute.
            stack.extend((f"{name}.{key}", value) for key, value in getattr(node, "__dict__", {}).items())
        else:
            stack.extend((f"{name}[{i}]", value) for i, value in enumerate(node))


def replaced(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of ``tree`` with every leaf replaced by ``change(leaf)``; keys stay, and what stood in two places does.

    Attributes of containers stay too: a module's state carries its version numbers in one.
    """
    return _replaced(tree, change, {})


def _replaced(node: Any, change: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    if id(node) in done:
        return done[id(node)]
    kind = type(node)
    result: Any
    if kind in _MAPPINGS:
        result = kind()
        for key, value in node.items():
            result[key] = _replaced(value, change, done)
        getattr(result, "__dict__", {}).update(getattr(node, "__dict__", {}))
    elif kind in _SEQUENCES:
        result = kind(_replaced(value, change, done) for value in node)
    else:
        result = change(node)
    done[id(node)] = result
    return result
