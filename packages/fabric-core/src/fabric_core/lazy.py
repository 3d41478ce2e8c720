"""Name tables: modules that hold no code but the names of things that live elsewhere, loaded when first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def name_table(
    module: str, table: Mapping[str, str], *, other_distributions: bool = False
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) for a module whose names are listed as ``"module:attribute"``.

    ``dir()`` shows what the module lists in ``__all__``; the table may hold more, such as spellings of old.

    Args:
        module: ``__name__`` of the module.
        table: public name to target. A target without ``:`` is a module.
        other_distributions: look in the table of Fabric's own backends for names that are not listed, so that the
            import works, or says what to install.
    """

    def load(name: str) -> Any:
        target = table.get(name)
        if target is None:
            if other_distributions and not name.startswith("_"):
                find = importlib.import_module("fabric_core.registry.elsewhere").class_from_elsewhere
                if (value := find(name)) is not None:
                    return value
            raise AttributeError(f"module {module!r} has no attribute {name!r}. It has {', '.join(public())}.")
        path, _, attribute = target.partition(":")
        found: Any = importlib.import_module(path)
        return getattr(found, attribute) if attribute else found

    def public() -> list[str]:
        return sorted(vars(sys.modules[module]).get("__all__", table))  # missing while the module is being loaded

    return load, public
