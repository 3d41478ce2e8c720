"""Running parts of the forward again in backward instead of keeping what they computed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.rank_zero import rank_zero_deprecation, rank_zero_warn
from fabric_core.strategies.sharded.wrapping import Policy, check_policy, selected
from fabric_core.warnings import user_stacklevel

_MARK = "_fabric_checkpointed"


@dataclass(frozen=True)
class SelectiveCheckpoint:
    """An ``activation_checkpointing_policy`` that keeps the results of some operations and runs the others again.

    Keeping what is slow to compute and small to store gives most of the memory back for little time::

        SelectiveCheckpoint({Block}, save=[torch.ops.aten.mm, torch.ops.aten._scaled_dot_product_flash_attention])

    Args:
        policy: which modules are checkpointed; as for ``activation_checkpointing_policy``.
        save: the operations whose results are kept: ``torch.ops.aten.mm.default``, or ``torch.ops.aten.mm`` for all
            its overloads. Or a function ``(ctx, op, *args, **kwargs)`` that returns a
            ``torch.utils.checkpoint.CheckpointPolicy`` for each call of an operation.
    """

    policy: Policy
    save: Sequence[Any] | Callable[..., Any]

    def contexts(self) -> Any:
        """The pair of contexts for one checkpointed forward, as ``torch.utils.checkpoint`` wants them."""
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        return create_selective_checkpoint_contexts(self.save if callable(self.save) else _overloads(self.save))


def _overloads(operations: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for operation in operations:
        if isinstance(operation, torch._ops.OpOverloadPacket):
            found.extend(getattr(operation, name) for name in operation.overloads())
        elif isinstance(operation, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
            found.append(operation)
        else:
            raise InvalidTypeError(
                f"SelectiveCheckpoint(save=...) lists {operation!r} ({type(operation).__name__}): expected operations "
                "such as torch.ops.aten.mm."
            )
    return found


def read_checkpointing(old: Any, policy: Policy | SelectiveCheckpoint | None) -> Policy | SelectiveCheckpoint | None:
    """The policy, from it or from the deprecated argument ``activation_checkpointing``, a class or a list of classes.

    Raises:
        ValueError: both are given.
        TypeError: no policy, or operations to save that are none.
    """
    if isinstance(policy, SelectiveCheckpoint):
        check_policy("SelectiveCheckpoint(policy=...)", policy.policy)
        if not callable(policy.save):
            _overloads(policy.save)
    else:
        check_policy("activation_checkpointing_policy", policy)
    if old is None:
        return policy
    if policy is not None:
        raise InvalidArgumentError(
            "activation_checkpointing and activation_checkpointing_policy are both given. Keep the latter."
        )
    classes = set(old) if isinstance(old, list | tuple | set | frozenset) else {old}
    names = ", ".join(sorted(getattr(cls, "__name__", repr(cls)) for cls in classes))
    rank_zero_deprecation(
        f"activation_checkpointing will go away: pass activation_checkpointing_policy={{{names}}} instead.",
        stacklevel=user_stacklevel(),
    )
    return classes


def checkpoint_modules(
    root: nn.Module, policy: Policy | SelectiveCheckpoint | None, units: Collection[nn.Module] = ()
) -> list[nn.Module]:
    """Have the modules inside ``root`` that the policy picks run again in backward; return them.

    What a module computed between its inputs and its output is then not kept but computed a second time, with the same
    random numbers. Only ``forward`` is replaced, on the object: names in the state dict stay, and hooks run once.

    Modules that are checkpointed already are left as they are, with a warning.

    Args:
        root: the whole module.
        policy: as ``read_checkpointing`` returned it.
        units: modules that are sharded by themselves.

    Raises:
        ValueError: the operations of a module are chosen from, and it holds units.
    """
    if policy is None:
        return []
    selective = policy if isinstance(policy, SelectiveCheckpoint) else None
    which = selective.policy if selective is not None else policy
    if which is None:
        raise InvalidTypeError("SelectiveCheckpoint(policy=None): say which modules, such as {Block}.")
    modules = list(selected(root, which))
    already = [module for module in modules if is_checkpointed(root, module)]
    if already:
        rank_zero_warn(
            f"{len(already)} modules of {', '.join(sorted({type(m).__name__ for m in already}))} are checkpointed "
            "already, and the activation_checkpointing_policy leaves them as they are.",
            stacklevel=user_stacklevel(),
        )
    elif not modules:
        rank_zero_warn(
            f"activation_checkpointing_policy={which!r} matches no module of {type(root).__name__}.",
            stacklevel=user_stacklevel(),
        )
    fresh = [module for module in modules if module not in already]
    contexts = selective.contexts if selective is not None else None
    for module in fresh:
        inside = next((part for part in module.modules() if part is not module and part in units), None)
        if selective is not None and inside is not None:
            raise InvalidArgumentError(
                f"SelectiveCheckpoint picks a {type(module).__name__}, which holds a {type(inside).__name__} that is "
                "sharded by itself: gathering its parameters would count among the operations to choose from. Pick "
                "modules without units inside, such as the units, or do without choosing operations."
            )
        module.forward = _checkpointed(module, contexts)
    return fresh


def is_checkpointed(root: nn.Module, module: nn.Module) -> bool:
    """Whether ``module``, a part of ``root``, is checkpointed, by this file or by torch's wrapper around it."""
    if hasattr(module.forward, _MARK):
        return True
    torchs = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    if torchs is None:  # not imported: then nothing can be wrapped in it
        return False
    wrappers = [part for part in root.modules() if isinstance(part, torchs.ActivationWrapper)]
    return any(module is part or module is part._checkpoint_wrapped_module for part in wrappers)


def _checkpointed(module: nn.Module, contexts: Callable[[], Any] | None) -> MethodType:
    """A method in place of ``module.forward``.

    A method, and not a function that remembers the module, so that ``torch.compile`` has one graph for all modules of a
    class, and copies of the module call themselves.
    """
    options: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    forward: Any = module.forward
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    plain = forward.__func__ if bound else lambda _, *args, **kwargs: forward(*args, **kwargs)

    @functools.wraps(forward.__func__ if bound else type(module).forward)
    def run_again_in_backward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(self, *args, **kwargs)
        return checkpoint(plain, self, *args, use_reentrant=False, **options, **kwargs)

    setattr(run_again_in_backward, _MARK, True)
    return MethodType(run_again_in_backward, module)
