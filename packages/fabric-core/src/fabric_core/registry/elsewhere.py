"""Class names that live in other distributions, for ``from fabric_core.strategies import ...``."""

from __future__ import annotations

from typing import Any

from fabric_core.errors import PluginLoadError
from fabric_core.registry.known import CLASSES
from fabric_core.registry.loading import import_value


def class_from_elsewhere(name: str) -> Any:
    """The class, if one of Fabric's own backends has it; ``None`` for a name that none of them has.

    Raises:
        PluginLoadError: an ``ImportError`` that says what to install.
    """
    if name not in CLASSES:
        return None
    dist, value = CLASSES[name]
    try:
        return import_value(value)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != value.partition(".")[0]:
            raise  # the backend is installed, something it needs is not
        raise PluginLoadError(f"{name} lives in {dist}, which is not installed: pip install {dist}") from None
