"""What ``state_dict`` and ``load_state_dict`` of the model and the optimizer mean that ``fabric.setup`` returned.

The module inside an engine has only a part of the truth: the optimizer steps other copies of its weights, and at stage
3 parameters are in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from fabric_core.checkpoint.portable import clean_keys
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.errors import UnsupportedError, UsageError
from fabric_deepspeed.checkpoint.live import flat_optimizer, live_state
from fabric_deepspeed.checkpoint.mixin import DeepSpeedCheckpoints
from fabric_deepspeed.checkpoint.optimizer_state import load_state, match_state
from fabric_deepspeed.engine import engine_of


class DifferingKeys(NamedTuple):
    """What ``load_state_dict(strict=False)`` did not load."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class DeepSpeedCovers(DeepSpeedCheckpoints):
    """The methods of the contract that the covers around modules and optimizers call."""

    def module_state(self, module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own, which has the weights of stages 0 to 2.

        Raises:
            RuntimeError: parameters are in parts, as at stage 3, and one rank alone cannot see them whole.
        """
        parts = [name for name, p in module.named_parameters() if getattr(p, "ds_numel", p.numel()) != p.numel()]
        if parts:
            raise UsageError(
                f"model.state_dict(): at stage 3 each process holds a part of {parts[0]!r} and of "
                f"{len(parts) - 1} other parameters. Call fabric.strategy.get_module_state_dict(model) on every rank, "
                "which gives the whole on rank 0, or fabric.save(path, state)."
            )
        return super().module_state(module, *args, **kwargs)

    def load_module_state(
        self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> DifferingKeys:
        """Into the module, and into the weights that its optimizer steps. Every rank calls it, with the same.

        Raises:
            CheckpointKeyError, CheckpointError: keys or shapes that differ; nothing was changed.
            NotImplementedError: ``assign``, because DeepSpeed owns the memory of the parameters.
        """
        if assign:
            raise UnsupportedError(
                "model.load_state_dict(assign=True): DeepSpeed owns the memory of the parameters. Leave assign away; "
                "the values are copied."
            )
        engine = engine_of(module)
        known = live_state(engine).keys() if engine is not None else module.state_dict().keys()
        given = clean_keys(state_dict).keys()
        self.load_module_state_dict(module, state_dict, strict)
        return DifferingKeys([key for key in known if key not in given], [key for key in given if key not in known])

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """What ``optimizer.state_dict()`` gave; rank 0's counts. Every rank calls it.

        Raises:
            CheckpointKeyError, CheckpointError: it is not for these parameters; nothing was changed.
        """
        engine = engine_of(optimizer)
        flat = None if engine is None else flat_optimizer(engine)
        if flat is None:
            super().load_optimizer_state(optimizer, state_dict)
            return
        state = ranks_of().broadcast(state_dict)
        load_state(engine, flat, match_state(flat, state, True, "The state dict"), lambda value: value)
