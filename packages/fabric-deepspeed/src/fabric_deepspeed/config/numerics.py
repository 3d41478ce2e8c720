"""What the precision asks of the dictionary, held against what the user wrote there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.floats import BFloat16Config
from fabric_deepspeed.config.keywords import FLOAT16_PATHS
from fabric_deepspeed.config.merge import check_contradictions, fill, fill_autos, warn_without_effect
from fabric_deepspeed.config.sections import float16_of_keywords
from fabric_deepspeed.config.tree import put, stated

_SECTIONS: Final[dict[str, str | None]] = {
    "32-true": None,
    "16-true": "fp16",
    "16-mixed": "fp16",
    "bf16-true": "bf16",
    "bf16-mixed": "bf16",
}
_NAMES: Final = {"fp16": '"16-mixed" or "16-true"', "bf16": '"bf16-mixed" or "bf16-true"'}
_AUTOCAST: Final = {"fp16": "16-mixed", "float16": "16-mixed", "half": "16-mixed"} | dict.fromkeys(
    ("bf16", "bfloat16"), "bf16-mixed"
)


def add_precision(document: dict[str, Any], keywords: Mapping[str, Any], typed: set[str], precision: str) -> None:
    """Switch on the one section that the precision needs, in place; none if torch's autocast does it.

    Raises:
        ValueError: no such precision, or the user switched on what another one needs, or off what this one needs.
    """
    if precision not in _SECTIONS:
        raise InvalidArgumentError(f"precision={precision!r}: expected one of {', '.join(_SECTIONS)}.")
    needed = None if _casts_by_torch(document, precision) else _SECTIONS[precision]
    given = {name for name in ("fp16", "bf16") if document.get(name) is not None}
    for name in given:
        _switch(document, name, name == needed, precision)
    wanted: dict[str, Any] = {}
    if needed == "fp16":
        wanted = {"fp16": float16_of_keywords(keywords).section()}
    elif needed == "bf16":
        wanted = {"bf16": BFloat16Config().section()}
    typed = typed & set(FLOAT16_PATHS)
    if needed == "fp16":
        check_contradictions(document, keywords, typed, "DeepSpeed's configuration")
    if needed in given:
        fill(document, wanted, typed)
    else:
        document.update(wanted)
    fill_autos(document, wanted, [path for paths in FLOAT16_PATHS.values() for path in paths])
    warn_without_effect(wanted, keywords, typed, f"with precision={precision!r}")


def _switch(document: dict[str, Any], name: str, needed: bool, precision: str) -> None:
    says = stated(document, (name, "enabled"))
    if says is None:
        put(document, (name, "enabled"), needed)
    elif bool(says) != needed:
        way = f"precision={_NAMES[name]}" if says else "a precision that does without"
        raise InvalidArgumentError(
            f"DeepSpeed's configuration says {name}.enabled={says!r}, but precision={precision!r}. Pass "
            f"Fabric({way}), or remove the section {name!r}: it is written as the precision needs it."
        )


def _casts_by_torch(document: Mapping[str, Any], precision: str) -> bool:
    """Whether the user has chosen torch's autocast, which goes with a mixed precision of the same dtype only."""
    if not stated(document, ("torch_autocast", "enabled")):
        return False
    dtype = stated(document, ("torch_autocast", "dtype"))
    fits = _AUTOCAST.get(str(dtype).removeprefix("torch."))
    if precision != fits:
        raise InvalidArgumentError(
            f"DeepSpeed's configuration says torch_autocast with dtype={dtype!r}, but precision={precision!r}. Pass "
            f"Fabric(precision={fits or 'bf16-mixed'!r}) with the dtype of that name, or remove the section."
        )
    return True
