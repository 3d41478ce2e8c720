"""Text as bytes, cut into windows, in an order that does not depend on the number of processes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset

# Of the standard library: what was installed beside it, its tests, and tables that are not written by people.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})


def standard_library() -> list[Path]:
    """The sources of Python's standard library, in an order that is the same everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(sources) if not _SKIPPED.intersection(path.parts)]


def read_text(folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Training and validation text as ``uint8``: the first nine tenths and the last tenth of all bytes.

    Reads every text file below ``folder``, in the order of their paths, or else the standard library. A file with a
    zero byte is not text.
    """
    files = standard_library() if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
    contents = (path.read_bytes() for path in files)
    text = bytearray().join(content for content in contents if b"\0" not in content)
    if not text:
        raise SystemExit(f"There is no text in {folder or 'the standard library'}.")
    everything = torch.frombuffer(text, dtype=torch.uint8)
    cut = len(everything) * 9 // 10
    return everything[:cut], everything[cut:]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """The text cut into pieces of ``size`` bytes; an item is a piece and the same piece one byte later."""

    def __init__(self, text: Tensor, size: int) -> None:
        if len(text) <= size:
            raise SystemExit(f"The text is too short: its {len(text)} bytes hold no window of {size} + 1.")
        self.text, self.size = text, size

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.size
        piece = self.text[start : start + self.size + 1].long()
        return piece[:-1], piece[1:]


class TrainingOrder(Sampler[int]):
    """The indices ``first`` to ``last`` of an endless row of passes over ``size`` items, each pass shuffled anew.

    The order depends on ``seed`` alone, so a resumed run continues it by giving a later ``first``. Fabric deals the
    indices out in turn, one to each process: N processes with ``batch / N`` items each see, together, the very
    ``batch`` that one process would see.
    """

    def __init__(self, size: int, seed: int, first: int, last: int) -> None:
        self.size, self.seed, self.first, self.last = size, seed, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self.first // self.size, -(-self.last // self.size)):
            before = epoch * self.size
            shuffled = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            yield from shuffled[max(self.first - before, 0) : self.last - before]


def spread(windows: Windows, count: int) -> Subset[tuple[Tensor, Tensor]]:
    """``count`` windows spread evenly over the text, the same ones each time."""
    return Subset(windows, [index * len(windows) // count for index in range(count)])
