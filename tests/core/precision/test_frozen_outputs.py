"""Models may return frozen dataclasses."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fabric_core import Fabric


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    name: str = "x"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return Output(self.layer(x))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_a_frozen_output_is_converted(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    output = fabric.setup(Model())(torch.ones(1, 2))
    assert isinstance(output, Output)
    assert output.logits.dtype is torch.float32
    fabric.backward(output.logits.sum())
