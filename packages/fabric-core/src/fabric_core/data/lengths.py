"""How long loaders and datasets say they are."""

from __future__ import annotations

from torch.utils.data import IterableDataset

from fabric_core.rank_zero import rank_zero_warn


def has_iterable_dataset(loader: object) -> bool:
    """Whether the loader reads a stream (an ``IterableDataset``), which no sampler can divide among ranks."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def sized_len(data: object) -> int | None:
    """``len(data)``, ``None`` if it has none."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_len(loader: object) -> bool:
    """Whether ``len(loader)`` works; rank 0 warns if the length is zero, or is what a stream claims about itself."""
    length = sized_len(loader)
    if length == 0:
        rank_zero_warn(f"{type(loader).__name__} has length 0: a loop over it does nothing.", stacklevel=2)
    if length is not None and has_iterable_dataset(loader):
        rank_zero_warn(
            f"{type(loader).__name__} takes its length from the IterableDataset's __len__. With several workers it is "
            "right only if the dataset gives each worker its own share (torch.utils.data.get_worker_info).",
            stacklevel=2,
        )
    return length is not None
