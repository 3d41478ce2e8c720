"""The accepted spellings of precisions. The old short ones stay, some with a word of advice."""

from __future__ import annotations

from typing import Final

SHORT: Final[dict[str, str]] = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Short spelling to full name. ``16`` and ``bf16`` have always meant mixed precision."""

AMBIGUOUS: Final = frozenset({"16", "bf16"})
"""Short spellings that hide whether weights are half or single precision."""


def full_name(precision: object) -> str:
    """The registered name that a user's spelling stands for; unknown words come back lower-case as they are.

    Where a module or a distribution is named, as in ``"package.module:Class"``, nothing is changed.
    """
    text = str(precision).strip()
    if ":" in text:
        return text
    text = text.lower()
    return SHORT.get(text, text)
