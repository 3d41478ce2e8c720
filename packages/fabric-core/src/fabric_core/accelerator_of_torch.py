"""The accelerator that this build of torch serves and this machine has, asked without initialising its runtime."""

from __future__ import annotations

import torch


def accelerator_of_torch() -> torch.device | None:
    """The type of device behind ``torch.accelerator``, without index; ``None`` if none can be used.

    Counting devices, and not ``torch.accelerator.is_available``, because the latter can create a context that makes
    forking unsafe.
    """
    try:
        device = torch.accelerator.current_accelerator()
        return device if device is not None and torch.accelerator.device_count() > 0 else None
    except RuntimeError:  # how torch 2.6 says that it was built without any
        return None
