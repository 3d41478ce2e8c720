"""The ways to keep weights in few bits, as data. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fabric_core.errors import InvalidArgumentError

ModeName = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"]


@dataclass(frozen=True)
class Mode:
    """One way.

    Attributes:
        name: as ``BitsandbytesPrecision(mode)`` takes it.
        bits: of each weight that takes part in a matrix product.
        quant_type: what the values of 4 bits stand for, ``"nf4"`` or ``"fp4"``; empty for 8 bits.
        nested: the scales of the blocks are quantised too, which saves 0.4 bits per weight.
        trainable: weights stay in 16 bits and take gradients; each product quantises them anew.
    """

    name: str
    bits: Literal[4, 8]
    quant_type: str = ""
    nested: bool = False
    trainable: bool = False


MODES: Final[dict[str, Mode]] = {
    mode.name: mode
    for mode in (
        Mode("nf4", 4, "nf4"),
        Mode("nf4-dq", 4, "nf4", nested=True),
        Mode("fp4", 4, "fp4"),
        Mode("fp4-dq", 4, "fp4", nested=True),
        Mode("int8", 8),
        Mode("int8-training", 8, trainable=True),
    )
}
"""All modes by name."""


def find_mode(name: str) -> Mode:
    """The mode of that name; ``ValueError`` for another word."""
    if not isinstance(name, str) or name not in MODES:
        raise InvalidArgumentError(f"BitsandbytesPrecision({name!r}): expected one of {', '.join(map(repr, MODES))}.")
    return MODES[name]


def mode_of(bits: int, quant_type: str = "", nested: bool = False) -> str:
    """The name of the mode that stores weights like this; for messages."""
    stored = (bits, quant_type, nested)
    return next(mode.name for mode in MODES.values() if (mode.bits, mode.quant_type, mode.nested) == stored)
