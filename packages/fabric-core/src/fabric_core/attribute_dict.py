"""A dict whose items are attributes too."""

from __future__ import annotations

from typing import Any


class AttributeDict(dict[str, Any]):
    """A dict in which ``d.key`` is ``d["key"]``, to read, write and delete; printed sorted, one line per item."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise self._missing(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise self._missing(name) from None

    def _missing(self, name: str) -> AttributeError:
        known = ", ".join(sorted(map(str, self))) or "none"
        return AttributeError(f"{type(self).__name__} has no item {name!r}; it has: {known}.", name=name, obj=self)

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 3
        return "\n".join(f"{f'{chr(34)}{key}{chr(34)}:':<{width}} {self[key]!r}" for key in sorted(self, key=str))
