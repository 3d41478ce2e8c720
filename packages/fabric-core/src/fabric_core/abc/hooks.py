"""What a plugin's hook module uses: the ``hookimpl`` marker and the values that hooks exchange with core.

A hook module is named by an entry point in the group ``fabric.hooks``. It is light: it imports neither torch nor the
backend at module level, because it is loaded whenever ``Fabric(...)`` has to choose something::

    from fabric_core.abc.hooks import Candidate, hookimpl

    @hookimpl
    def fabric_accelerator_candidates(ctx):
        return Candidate("mydevice", priority=20, available=_count() > 0, reason="no driver found")
"""

from __future__ import annotations

import pluggy

from fabric_core.abc.choosing import Candidate, Problem, ResolveContext

__all__ = ["PROJECT", "Candidate", "Problem", "ResolveContext", "hookimpl"]

PROJECT = "fabric"
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a hook module as an implementation of the hook of the same name."""
