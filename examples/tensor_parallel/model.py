"""A small transformer in the style of Llama, over characters. Nothing in it knows that it may be split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """The shape of the model; ``dim`` is a multiple of twice the number of heads."""

    vocabulary: int
    layers: int = 2
    heads: int = 4
    dim: int = 64


class Attention(nn.Module):
    """Causal self-attention. The number of heads follows from the projections, which may hold a share of them only."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, config.dim, bias=False)
        self.value = nn.Linear(config.dim, config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``(batch, time, dim)`` to the same shape; ``rotation`` is from ``rotations``."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU, ``down(silu(gate(x)) * up(x))`` (Shazeer, 2020: GLU Variants Improve Transformer)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, dim)`` to the same shape."""
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Attention, then a perceptron; each reads a normalised copy of the stream and adds to it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``(batch, time, dim)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Transformer(nn.Module):
    """Predicts the next character at every position."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map character numbers ``(batch, time)`` to logits ``(batch, time, vocabulary)``."""
        rotation = rotations(tokens.shape[1], self.config.dim // self.config.heads, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def rotations(time: int, head_dim: int, device: torch.device) -> Tensor:
    """Unit complex numbers of shape ``(time, head_dim / 2)``, one turn per position (Su et al., 2021: RoFormer)."""
    speed = 10_000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    angle = torch.outer(torch.arange(time, device=device), speed)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of features of ``x``, shape ``(batch, heads, time, head_dim)``, by their position's angle."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)
