"""What the registry may ask of this package. Neither torch nor bitsandbytes is imported here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from fabric_core.abc.hooks import Problem, hookimpl
from fabric_core.warnings import possible_user_warning


@hookimpl
def fabric_validate(plan: Any) -> Iterable[Problem]:
    """Refuse strategies that would split quantised weights, or hand them to an engine of their own."""
    if not _is_ours(plan.precision.value):
        return []
    strategy = plan.strategy.value
    if strategy.shards_in_place:
        reason = "which splits parameters: a quantised weight cannot be split apart from its scales."
    elif strategy.setup_mode == "joint":
        reason = "whose engine casts and moves parameters by itself: that would destroy quantised ones."
    else:
        return []
    message = (
        f"precision={plan.precision.name!r} ({plan.precision.origin}) cannot be used with "
        f"strategy={plan.strategy.name!r} ({plan.strategy.origin}), {reason}"
    )
    return [Problem(message, 'Use strategy="ddp" or a single device.')]


@hookimpl
def fabric_on_setup(fabric: Any, module: Any, optimizers: list[Any]) -> None:
    """Warn of optimizers over weights that are not in the module any more."""
    precision = fabric.strategy.precision
    lost = precision.lost_parameters(optimizers) if optimizers and _is_ours(precision) else 0
    if lost:
        possible_user_warning(
            f"{lost} parameters of the optimizer are weights that precision={precision.precision!r} has replaced by "
            "quantised ones, which are frozen: they will not be trained, and keep their memory. Create the optimizer "
            "afterwards: model = fabric.setup_module(model), then fabric.setup_optimizers(optimizer) with an optimizer "
            "over the parameters that require gradients."
        )


def _is_ours(precision: object) -> bool:
    module = sys.modules.get("fabric_bnb.precision")  # not imported: then it is none of ours
    return module is not None and isinstance(precision, module.BitsandbytesPrecision)
