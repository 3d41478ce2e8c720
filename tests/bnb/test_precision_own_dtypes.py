"""Layers that are not quantised get their inputs in the dtype of their own parameters."""

import pytest
import torch
from torch import nn

from fabric_bnb import BitsandbytesPrecision
from fabric_core import Fabric


def test_layers_that_are_not_quantized_compute_in_their_own_dtype():
    """Inputs arrive in bfloat16, which a convolution in float32 would refuse."""
    precision = BitsandbytesPrecision("nf4", ignore_modules={"4"})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 64), nn.Linear(64, 5))
    seen = []
    net[4].register_forward_hook(lambda layer, args, y: seen.append((args[0].dtype, y.dtype)))
    model = Fabric(accelerator="cpu", devices=1, plugins=precision).setup(net)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert type(net[4]) is nn.Linear
    assert seen == [(torch.float32, torch.float32)]
    assert net[0].weight.grad.dtype is torch.float32


class Flow(nn.Module):
    """A float32 scale or buffer between a linear layer and a part in another dtype."""

    def __init__(self, between, last):
        super().__init__()
        self.linear, self.last = nn.Linear(64, 64), last
        if between == "buffer":
            self.register_buffer("table", torch.ones(64))
        else:
            self.gain = nn.Sequential(nn.PReLU(64))

    def forward(self, x):
        y = self.linear(x)
        return self.last(y + self.table if hasattr(self, "table") else self.gain(y))


@pytest.mark.parametrize("between", ["buffer", "parameter"])
@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_layers_in_the_compute_dtype_get_it_after_others_in_single_precision(mode, between):
    fabric = Fabric(accelerator="cpu", devices=1, precision=f"bnb-{mode}")
    norm = nn.LayerNorm(64, dtype=fabric.strategy.precision.compute_dtype)
    norm.register_forward_hook(lambda part, args, y: seen.append((args[0].dtype, y.dtype)))
    seen = []
    fabric.setup(Flow(between, norm))(torch.randn(2, 64)).sum().backward()
    assert seen == [(norm.weight.dtype, norm.weight.dtype)]


def test_nothing_is_cast_where_all_is_in_the_compute_dtype():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bnb-nf4")
    with fabric.init_module():
        block = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    fabric.setup(block)
    assert not any(part._forward_pre_hooks for part in block.modules())
