"""Values ``"auto"``: the configuration leaves them to the program, which knows some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.keywords import FLOAT16_PATHS, PATHS, Path
from fabric_deepspeed.config.merge import fill_autos
from fabric_deepspeed.config.tree import autos, put, remove

_LEFT_OUT: Final[tuple[Path, ...]] = (("train_batch_size",), ("gradient_clipping",))
_LATER: Final[frozenset[Path]] = frozenset(
    {("fp16", "enabled"), ("bf16", "enabled"), *(path for paths in FLOAT16_PATHS.values() for path in paths)}
)
_OF_DEEPSPEED: Final[tuple[Path, ...]] = (
    ("pipeline",),
    ("autotuning",),
    ("expert_parallel",),
    ("zero_optimization", "zenflow"),
    ("data_types", "keep_in_fp32_modules"),
)
"""Where ``"auto"`` is a word of DeepSpeed's own."""


def settle_autos(document: dict[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Give every ``"auto"`` a value, in place; those about precision wait until it is known.

    Arguments of the strategy say their values. Batch size and clipping are left out, gradients are not accumulated.

    Raises:
        ValueError: one that nothing here knows; the message lists all of them.
    """
    fill_autos(document, wanted, [path for paths in PATHS.values() for path in paths])
    for path in list(autos(document)):
        if path in _LEFT_OUT:
            remove(document, path)
        elif path == ("gradient_accumulation_steps",):
            put(document, path, 1)
    unknown = [path for path in autos(document) if path not in _LATER and not _is_of_deepspeed(path)]
    if unknown:
        raise InvalidArgumentError(
            f'{source} says "auto" for {", ".join(map(".".join, unknown))}, and nothing here knows a value. Write one, '
            "or remove the key to have DeepSpeed's default."
        )


def _is_of_deepspeed(path: Path) -> bool:
    return any(path[: len(own)] == own for own in _OF_DEEPSPEED)
