"""Modules with loading code of their own: what is below them cannot be compared key by key, but they can be asked.

Such code may rename, reshape or quantise. A method ``state_dict_problems(state_dict, prefix, strict)`` beside it gives
the sentences that it has against the entries that begin with ``prefix``, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fabric_core.checkpoint.portable import clean_name, inside_wrapper
from fabric_core.errors import InvalidTypeError


def loads_itself(module: nn.Module) -> bool:
    """Whether the module has loading code of its own, or hooks that come before it."""
    hooks = getattr(module, "_load_state_dict_pre_hooks", {}).values()
    # Those of sharding and of activation checkpointing prepare the module, and put their prefix to names.
    if any(not origin_of(hook).startswith("torch.distributed.") for hook in hooks):
        return True
    for method in ("load_state_dict", "_load_from_state_dict"):
        if method in vars(module):
            return True
        own = getattr(type(module), method)
        # The modules of torch.nn only add entries that old checkpoints lack.
        if own is not getattr(nn.Module, method) and not own.__module__.startswith("torch.nn.modules."):
            return True
    return False


def self_loading(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside that load themselves, and what their clean keys begin with: nothing, for the whole module."""
    return [
        (f"{cleaned}." if (cleaned := clean_name(name)) else "", child)
        for name, child in inside_wrapper(module).named_modules(remove_duplicate=False)
        if loads_itself(child)
    ]


def own_problems(custom: list[tuple[str, nn.Module]], saved: Mapping[str, Any], strict: bool) -> Iterator[str]:
    """What the modules that ``self_loading`` found have against the clean ``saved``: sentences without full stop.

    ``TypeError`` if one answers with something else than sentences.
    """
    for number, (prefix, child) in enumerate(custom):
        ask = getattr(child, "state_dict_problems", None)
        if ask is None or any(prefix.startswith(above) for above, _ in custom[:number] if above != prefix):
            continue  # those below other such code may see other keys in the end
        answer = ask(saved, prefix, strict)
        if isinstance(answer, str) or not all(isinstance(sentence, str) for sentence in answer):
            raise InvalidTypeError(
                f"{type(child).__name__}.state_dict_problems() answered {answer!r}: expected a list of sentences, "
                "empty if all is well."
            )
        yield from (sentence.rstrip(".") for sentence in answer)


def origin_of(hook: Any) -> str:
    """The name of the Python module that a hook of a module comes from."""
    return str(getattr(getattr(hook, "hook", hook), "__module__", ""))
