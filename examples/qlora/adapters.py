"""Low-rank adapters beside frozen layers (Hu et al., 2021: LoRA; over 4-bit layers, Dettmers et al., 2023: QLoRA).

A layer's output gets ``alpha / rank * up(down(x))`` added to it, where ``down`` and ``up`` are two thin matrices and
all that is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LowRankLinear(nn.Module):
    """A linear layer, frozen, and an adapter beside it. At first the output is the layer's own: ``up`` is zero.

    The layer may be quantised before or after it is put in here. The adapter is made of bare parameters, not of
    linear layers, so that no precision takes them for layers to quantise; they stay in float32.

    Args:
        base: the layer, weights of shape ``(out_features, in_features)`` before they are quantised.
        rank: features between the two matrices, which are ``(rank, in_features)`` and ``(out_features, rank)``.
        alpha: the adapter counts ``alpha / rank`` times, so that a good learning rate fits any rank.
        dropout: the share of the adapter's inputs that training leaves out.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.adapter_down = nn.Parameter(torch.empty(rank, base.in_features))
        self.adapter_up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.normal_(self.adapter_down, std=1 / math.sqrt(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        y: Tensor = self.base(x)
        x = self.dropout(x.to(self.adapter_down.dtype))
        added = functional.linear(functional.linear(x, self.adapter_down), self.adapter_up)
        return y + (self.scale * added).to(y.dtype)


def add_adapters(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> list[nn.Parameter]:
    """Freeze ``model``, put an adapter beside each of its linear layers, and return what is left to train."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, LowRankLinear(child, rank, alpha, dropout))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def of_adapter(key: str, value: Any = None) -> bool:
    """Whether a key of the model's state belongs to an adapter; with ``value``, a filter for ``fabric.save``."""
    return key.rpartition(".")[2].startswith("adapter_")
