"""Which entry points are installed: read late, all at once, and not twice."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fabric_core.registry.ref import Entry, dist_key
from fabric_core.registry.switches import trace

if TYPE_CHECKING:
    from fabric_core.registry.metadata import Scan


class Discovery:
    """The entry points of installed distributions. At most one scan, until ``refresh`` asks for another.

    Args:
        entries: take these instead of what is installed.

    Attributes:
        scans: how often all distributions were looked through.
        generation: how often ``refresh`` was called.
    """

    def __init__(self, entries: Iterable[Entry] | None = None) -> None:
        self._given = None if entries is None else tuple(entries)
        self._scan: Scan | None = None
        self._single: dict[str, tuple[Entry, ...]] = {}
        self._lock = threading.Lock()
        self.scans = 0
        self.generation = 0

    @property
    def scanned(self) -> bool:
        """Whether ``entries`` answers from memory."""
        return self._given is not None or self._scan is not None

    def entries(self) -> tuple[Entry, ...]:
        """Every entry point of every distribution."""
        return self._given if self._given is not None else self._installed().entries

    def entries_of(self, dist: str) -> tuple[Entry, ...]:
        """The entry points of one distribution, empty if it is not installed. Costs no scan."""
        key = dist_key(dist)
        if self.scanned:
            return tuple(entry for entry in self.entries() if dist_key(entry.dist) == key)
        if key not in self._single:
            from fabric_core.registry import metadata

            found = metadata.lookup(key).entries
            if not found:  # not remembered: it may be installed a moment later
                return ()
            self._single[key] = found
        return self._single[key]

    def damaged(self) -> tuple[tuple[str, str], ...]:
        """Distributions whose metadata cannot be read, each with the reason."""
        return () if self._given is not None else self._installed().damaged

    def refresh(self) -> None:
        """Forget what was read, so that what was installed meanwhile is seen."""
        importlib.invalidate_caches()
        with self._lock:
            self._scan = None
            self._single.clear()
            self.generation += 1

    def _installed(self) -> Scan:
        with self._lock:
            if self._scan is None:
                start = time.perf_counter()
                from fabric_core.registry import metadata

                self._scan = metadata.scan()
                self.scans += 1
                trace(f"scan: {len(self._scan.entries)} entry points, {1000 * (time.perf_counter() - start):.1f} ms")
            return self._scan
