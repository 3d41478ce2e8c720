"""DeepSpeed engines: making one for training or for inference, finding the one of an object, and ending it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_core.wrappers.unwrap import unwrap
from fabric_deepspeed.backend import silenced, without_notice_of_optimizer
from fabric_deepspeed.initialising import split_in_float32
from fabric_deepspeed.nvme import correct_nvme

Engine: TypeAlias = Any
"""A ``deepspeed.DeepSpeedEngine``, which has no types."""

_known: Final[weakref.WeakKeyDictionary[Any, weakref.ref[Engine]]] = weakref.WeakKeyDictionary()
"""Engine by what a user may hold of it: the engine, the module inside, the optimizer given and the one made of it."""


def engine_of(obj: Any) -> Engine | None:
    """The live engine for an engine, for the module inside one, or for an optimizer that one owns; else ``None``.

    What ``fabric.setup`` returned counts as what is inside.
    """
    try:
        found = _known.get(obj) or _known.get(unwrap(obj))
    except TypeError:  # not hashable, or without weak references: nothing of an engine
        return None
    return None if found is None else found()


def build_engine(
    deepspeed: ModuleType, module: nn.Module, optimizer: Optimizer | None, scheduler: Any, config: Mapping[str, Any]
) -> Engine:
    """An engine around ``module``, in place: DeepSpeed moves, casts and splits the parameters. Every rank calls it.

    Args:
        deepspeed: the package.
        module: bare, never compiled.
        optimizer: over parameters of the module; without one the engine is for inference.
        scheduler: to be stepped by the engine after each step; ``None`` for none.
        config: DeepSpeed's dictionary, final. It is copied.

    Raises:
        ValueError: the optimizer has a parameter that is none of the module's.
    """
    document = copy.deepcopy(dict(config))
    if optimizer is None:
        document = _for_inference(document)
    else:
        _check_owner(module, optimizer)
    _straighten(module)
    with silenced(), without_notice_of_optimizer():
        split_in_float32(deepspeed, module, document)
        engine, made, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=document, dist_init_required=False
        )
    if optimizer is not None and hasattr(made, "fp32_groups"):
        optimizer.state.clear()  # stage 0 with 16 bits has stepped once, with gradients of zero
    if optimizer is not None and made is not optimizer:
        optimizer.add_param_group = _refuse_group  # type: ignore[method-assign]
    if engine.zero_optimization_stage() == 3:
        _leave_inference_mode(engine)
        correct_nvme(engine)
    for holder in (engine, module, optimizer, made):
        if holder is not None:
            _known[holder] = weakref.ref(engine)
    return engine


def _check_owner(module: nn.Module, optimizer: Optimizer) -> None:
    own = set(module.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(parameter not in own for parameter in held)
    if foreign:
        raise InvalidArgumentError(
            f"fabric.setup(model, optimizer): {foreign} of the optimizer's {len(held)} parameters are none of the "
            f"model's, a {type(module).__name__}. DeepSpeed needs an optimizer over parameters of the model that it is "
            "set up with: make it from model.parameters() of this very model, after the last change of its layers."
        )


def _refuse_group(param_group: Any) -> None:
    raise added_group("optimizer.add_param_group(...)")


def added_group(how: str) -> UsageError:
    """The error where a group of parameters came ``how`` to an optimizer whose weights DeepSpeed has laid out."""
    return UsageError(
        f"{how} after fabric.setup(...): DeepSpeed has laid out the weights that it steps, and would not train another "
        "group. Give the optimizer all its groups before fabric.setup(model, optimizer); those that are to begin later "
        'can have "lr": 0.0 until then.'
    )


def _straighten(module: nn.Module) -> None:
    """Parameters in the usual order of memory, in place: DeepSpeed sends them as bytes, and flattens them."""
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _leave_inference_mode(engine: Engine) -> None:
    """Forward under ``torch.inference_mode()`` runs under ``torch.no_grad()`` instead.

    Stage 3 makes parameters whole in forward, and what is made in inference mode can never be trained.
    """
    inside, reference = type(engine).forward, weakref.ref(engine)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return inside(reference(), *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return inside(reference(), *args, **kwargs)

    engine.forward = forward


def _for_inference(document: dict[str, Any]) -> dict[str, Any]:
    """Without what needs an optimizer; stages 1 and 2 split nothing but its state and the gradients."""
    document = {key: value for key, value in document.items() if key not in ("optimizer", "scheduler")}
    zero = document.get("zero_optimization") or {}
    if zero.get("stage", 0) in (1, 2):
        document["zero_optimization"] = {"stage": 0}
    elif "offload_optimizer" in zero:
        document["zero_optimization"] = {key: value for key, value in zero.items() if key != "offload_optimizer"}
    return document


def destroy_engine(engine: Engine) -> None:
    """Take the engine's hooks off the module and its parameters, and free its buffers."""
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = engine.__dict__.get(name)
        if hook is not None:
            hook.remove()
    engine.destroy()
    for holder in [holder for holder, found in _known.items() if found() in (engine, None)]:
        del _known[holder]
        if isinstance(holder, Optimizer):
            vars(holder).pop("add_param_group", None)
