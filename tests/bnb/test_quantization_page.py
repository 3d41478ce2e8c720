"""What docs/quantization.md and the package's README show really runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PAGES = {"guide": ROOT / "docs" / "quantization.md", "README": ROOT / "packages" / "fabric-bnb" / "README.md"}


class Transformer(nn.Module):
    """What the pages call their model; its inputs are floats."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 16)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


@pytest.fixture(params=PAGES)
def page(request, tmp_path, monkeypatch, isolated):
    """The names that are there after all blocks of code of a page have run in a folder with a file of weights."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Transformer().state_dict(), "pretrained.pt")
    names = {"Transformer": Transformer, "batches": torch.randn(3, 8, 64), "__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[request.param].read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(block, names)
    return names


def test_every_block_of_code_runs(page):
    assert page["model"](torch.randn(4, 64, device=page["fabric"].device)).isfinite().all()


@pytest.mark.parametrize("page", ["guide"], indirect=True)
def test_adapters_merged_into_plain_layers_compute_the_same(page):
    x = torch.randn(4, 64)
    adapted = page["model"](x.to(page["fabric"].device)).cpu()
    untrained = Transformer()
    untrained.load_state_dict(torch.load("pretrained.pt"))
    assert (page["plain"](x) - adapted).norm() < 0.01 * adapted.norm()  # what computing in bfloat16 changes
    assert (untrained(x) - adapted).norm() > 0.03 * adapted.norm()
