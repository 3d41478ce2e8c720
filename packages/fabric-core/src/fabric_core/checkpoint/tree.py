"""Walking through nested plain containers, as checkpoints are made of."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
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
