"""How plugins are found by name. Nothing here imports a plugin before it is chosen, and nothing imports torch.

``get_registry()`` is the registry of this process. Read ``ref`` (what a plugin is called), ``lookup`` (which plugin a
name means) and ``hookspecs`` (what plugins can take part in), in this order.
"""

from __future__ import annotations

from fabric_core.registry.ref import Entry, PluginRef
from fabric_core.registry.registry import Registry, get_registry

__all__ = ["Entry", "PluginRef", "Registry", "get_registry"]
