"""Sums as text, the answer written from its last digit on: 47 + 85 = 132 is ``47+85=231``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

CHARACTERS = "0123456789+="
DIGITS = 2
PROMPT = 2 * DIGITS + 2
"""Characters up to and with the equals sign."""


class Sums(Dataset[tuple[Tensor, Tensor]]):
    """``count`` random sums; an item is its characters and the same one further on, the question's masked by -100.

    The answer's lowest digit comes first, so that each digit follows from what is written already. No sum among those
    with ``unseen`` is among those without.
    """

    def __init__(self, count: int, seed: int, unseen: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pairs = torch.randint(10**DIGITS, (count, 2), generator=generator)
        # Kept from training are the pairs with first + 3 x second = 0 modulo 10, a tenth of all.
        a, b = self.pairs.unbind(1)
        remainder = (a + 3 * b) % 10
        a += (10 - remainder) if unseen else (remainder == 0)
        a %= 10**DIGITS

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        a, b = self.pairs[index].tolist()
        answer = f"{a + b:0{DIGITS + 1}}"[::-1]
        text = encode(f"{a:0{DIGITS}}+{b:0{DIGITS}}={answer}")
        target = text[1:].clone()
        target[: PROMPT - 1] = -100  # what cross_entropy leaves out
        return text[:-1], target


def encode(text: str) -> Tensor:
    """The characters' numbers, shape ``(length,)``, int64."""
    return torch.tensor([CHARACTERS.index(character) for character in text])
