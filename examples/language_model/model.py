"""A small GPT over bytes: 256 tokens, no tokenizer to train or to ship."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. ``block_size`` is the longest context it can look back on, in bytes."""

    block_size: int = 64
    layers: int = 4
    heads: int = 4
    dim: int = 128
    dropout: float = 0.0


class Attention(nn.Module):
    """Causal self-attention: each position looks at itself and at what came before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, dim)`` to the same shape; inside, ``(batch, heads, time, dim / heads)``."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """Attention, then a two-layer perceptron; each reads a normalised copy of the stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim), nn.GELU(), nn.Linear(4 * config.dim, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, dim)`` to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class GPT(nn.Module):
    """Predicts the next byte at every position of a text."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.dim)
        self.position = nn.Embedding(config.block_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights that keep the size of their input, and smaller ones where contributions to the stream add up."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("token", "position")):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() == 2:
                summands = 2 * self.config.layers if name.endswith(("attention.out.weight", "mlp.2.weight")) else 1
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1] * summands))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``(batch, time)`` to logits ``(batch, time, 256)``; the head shares the embedding's weights."""
        time = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token(tokens) + self.position(time))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.token.weight)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.8) -> Tensor:
        """Append ``count`` sampled bytes to ``tokens`` of shape ``(batch, time)``."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.block_size :])[:, -1].float()
            choice = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
            tokens = torch.cat([tokens, choice], dim=1)
        return tokens
