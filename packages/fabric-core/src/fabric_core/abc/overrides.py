"""Finding out once, at set-up, which optional methods a plugin really implements, so that a step pays for no other."""

from __future__ import annotations


def overrides(obj: object, base: type, *names: str) -> bool:
    """Whether ``obj`` brings its own version of any of the methods ``names`` of ``base``, on its class or itself."""
    cls = type(obj)
    own = getattr(obj, "__dict__", {})
    return any(name in own or getattr(cls, name) is not getattr(base, name) for name in names)
