"""Whether a backward pass has reached an engine's parameters, also one that was not the engine's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from fabric_deepspeed.backend import kept_elsewhere


def watch_epilogue(optimizer: Any, arrives: Callable[[], Callable[[bool], bool] | None]) -> None:
    """Have an optimizer of stage 1 or 2 ask at the end of each backward pass through its module's outputs.

    DeepSpeed ends every pass through the outputs, and fails where none of the parameters got a gradient, as those of a
    critic that is frozen while the generator trains.

    Args:
        optimizer: DeepSpeed's.
        arrives: gives the function to ask, ``None`` when it is gone. That gets whether any gradient came, and returns
            whether DeepSpeed should go on.
    """
    reference = weakref.ref(optimizer)
    try:
        inside = type(optimizer).independent_gradient_partition_epilogue
        _anything(optimizer)
    except AttributeError:
        if hasattr(optimizer, "bit16_groups"):
            raise kept_elsewhere("the gradients that have come") from None
        return  # stage 1 that accumulates bfloat16 gradients in float32 has no buckets to be empty

    def epilogue() -> None:
        own: Any = reference()
        ask = arrives()
        if ask is None or ask(_anything(own)):
            inside(own)
        else:
            own._release_ipg_buffers()

    optimizer.independent_gradient_partition_epilogue = epilogue


def _anything(optimizer: Any) -> bool:
    waiting = any(bucket.params for bucket in optimizer.ipg_buckets.values())
    return waiting or any(optimizer.params_already_reduced)
