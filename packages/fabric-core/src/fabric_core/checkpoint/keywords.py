"""Passing a keyword that not every implementation of a method knows yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def supported(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Those of ``keywords`` that ``function`` accepts: implementations older than a keyword keep working."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}
