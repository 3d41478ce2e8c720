"""DeepSpeed's dictionary: put together from the user's configuration and the strategy's arguments.

The strategy calls ``assemble`` when it is made, ``finalize`` when it joins the other processes, and
``advise_on_offload`` when an optimizer is set up. In between users may edit the dictionary.

1. Without a configuration the arguments say everything, typed or not.
2. With one, it says everything, and arguments that were typed are added where it is silent. Where both speak and
   differ, it is an error. Defaults of arguments that were not typed are not used.
3. ``"auto"`` means that the configuration leaves a value to the program: the argument says it, typed or not.
4. What the program decides anyway (precision, optimizer) must not be contradicted by the configuration.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fabric_core.errors import InvalidArgumentError, UnsupportedError
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.warnings import user_stacklevel
from fabric_deepspeed.config.activation_checkpointing import ActivationCheckpointingConfig
from fabric_deepspeed.config.autos import settle_autos
from fabric_deepspeed.config.keywords import DEFAULTS, FLOAT16_PATHS
from fabric_deepspeed.config.known import warn_of_slips
from fabric_deepspeed.config.merge import check_contradictions, fill, values_of, warn_without_effect
from fabric_deepspeed.config.numerics import add_precision
from fabric_deepspeed.config.older import modernize
from fabric_deepspeed.config.sections import DeepSpeedConfig
from fabric_deepspeed.config.source import Source, read_source
from fabric_deepspeed.config.tree import AUTO, check_sections, lookup, stated
from fabric_deepspeed.config.zero import ZeroConfig, offloads_to

if TYPE_CHECKING:
    from torch.optim import Optimizer

_INSTEAD: Final = {
    "optimizer": "one such as torch.optim.AdamW(model.parameters(), lr=...), then fabric.setup(model, optimizer)",
    "scheduler": "a scheduler of torch.optim.lr_scheduler, then fabric.setup(model, optimizer, scheduler=scheduler)",
}


def config_keywords(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the constructor's arguments that end up in DeepSpeed's dictionary; the rest is left out."""
    return {name: arguments[name] for name in DEFAULTS}


def assemble(
    given: Mapping[str, Any] | DeepSpeedConfig | str | os.PathLike[str] | None,
    keywords: Mapping[str, Any],
    passed: frozenset[str],
) -> dict[str, Any]:
    """DeepSpeed's dictionary, as far as it is known without the precision. Touches neither torch nor DeepSpeed.

    Args:
        given: a dictionary, the path of a JSON file, a ``DeepSpeedConfig``; ``None`` asks PL_DEEPSPEED_CONFIG_PATH.
        keywords: what ``config_keywords`` returned.
        passed: names of arguments that the user typed; others may be in it. A value that is not the documented default
            counts as typed too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a value that cannot work, alone, together with others, or together with the arguments.
        TypeError: the configuration, or a section of it, is no dictionary.
        NotImplementedError: it makes the optimizer or the scheduler, which the program does here.
    """
    typed = _typed(keywords, passed)
    if "stage" in typed and keywords["stage"] and not keywords["zero_optimization"]:
        raise InvalidArgumentError(
            f"stage={keywords['stage']!r} and zero_optimization=False contradict each other: leave one of them out."
        )
    source = read_source(given.document() if isinstance(given, DeepSpeedConfig) else given)
    if source is None:
        document = wanted = DeepSpeedConfig.of_keywords(keywords).document()
    else:
        document, wanted = _merged(source, keywords, typed)
    warn_without_effect(wanted, keywords, typed - set(FLOAT16_PATHS), _why(wanted))
    _check(document)
    return document


def _typed(keywords: Mapping[str, Any], passed: frozenset[str]) -> set[str]:
    changed = {name for name, value in keywords.items() if value != DEFAULTS[name]}
    return {name for name in passed | changed if keywords.get(name) is not None}


def _merged(source: Source, keywords: Mapping[str, Any], typed: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    document = source.document
    modernize(document)
    warn_of_slips(document, source.words)
    check_sections(document, "zero_optimization", "aio", "activation_checkpointing", "fp16", "bf16")
    for name in ("optimizer", "scheduler"):
        if document.get(name) is not None:
            raise UnsupportedError(
                f"{source.words} has a section {name!r}. Here the program makes it: remove the section and write "
                f"{_INSTEAD[name]}."
            )
    check_contradictions(document, keywords, typed, source.words)
    wanted = DeepSpeedConfig.of_keywords(_effective(document, keywords, typed)).document()
    fill(document, wanted, typed)
    settle_autos(document, wanted, source.words)
    return document, wanted


def _effective(document: Mapping[str, Any], keywords: Mapping[str, Any], typed: set[str]) -> dict[str, Any]:
    """The arguments as if the user had typed what the configuration says."""
    says = values_of(document)
    if "stage" not in says and not typed & {"stage", "zero_optimization"}:
        says["zero_optimization"] = lookup(document, ("zero_optimization", "stage")) == AUTO
    says["number_checkpoints"] = stated(document, ("activation_checkpointing", "number_checkpoints"))
    return {**keywords, **{name: value for name, value in says.items() if name not in typed}}


def _why(wanted: Mapping[str, Any]) -> str:
    stage = zero_stage(wanted)
    zero = wanted.get("zero_optimization") or {}
    offloads = [
        f"{name} to {where}" for name in ("offload_optimizer", "offload_param") if (where := offloads_to(zero, name))
    ]
    return f"at stage {stage}, with {' and '.join(offloads) or 'nothing offloaded'}"


def finalize(
    document: Mapping[str, Any], keywords: Mapping[str, Any], passed: frozenset[str], *, precision: str
) -> dict[str, Any]:
    """A new dictionary, ready for ``deepspeed.initialize``: with precision, batch size and the optimizer let in.

    Gradients are not clipped unless the configuration says so.

    Calling it again with what it returned and the same precision changes nothing. Keep the dictionary of
    ``assemble`` if the precision may change later.

    Args:
        document: what ``assemble`` returned, perhaps edited by the user since.
        keywords: as for ``assemble``.
        passed: as for ``assemble``.
        precision: ``32-true``, ``16-true``, ``16-mixed``, ``bf16-true`` or ``bf16-mixed``.

    Raises:
        ValueError: the dictionary contradicts the precision, or was edited to something that cannot work.
    """
    final = copy.deepcopy(dict(document))
    _check(final)
    add_precision(final, keywords, _typed(keywords, passed), precision)
    if final.get("train_batch_size") is None and final.get("train_micro_batch_size_per_gpu") is None:
        final["train_micro_batch_size_per_gpu"] = 1
    final.setdefault("zero_allow_untested_optimizer", bool(keywords["zero_allow_untested_optimizer"]))
    if final.get("gradient_clipping") is None:
        final["gradient_clipping"] = 0.0  # without it, newer releases clip to 1.0
    if offloads_to(final.get("zero_optimization") or {}, "offload_optimizer"):
        final.setdefault("zero_force_ds_cpu_optimizer", False)
    return final


def _check(document: Mapping[str, Any]) -> None:
    check_sections(document, "zero_optimization", "activation_checkpointing", "fp16", "bf16", "torch_autocast")
    ZeroConfig.of(document.get("zero_optimization") or {})
    ActivationCheckpointingConfig.of(document.get("activation_checkpointing") or {})


def zero_stage(document: Mapping[str, Any]) -> int:
    """The ZeRO stage that the dictionary asks for, 0 to 3; 0 if it says nothing."""
    stage = stated(document, ("zero_optimization", "stage"))
    return 0 if stage is None else int(stage)


def advise_on_offload(document: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Warn on rank 0 where optimizer states are offloaded and the optimizer is not one of DeepSpeed's for CPUs."""
    where = offloads_to(document.get("zero_optimization") or {}, "offload_optimizer")
    if where is None or any(kind.__module__.startswith("deepspeed.") for kind in type(optimizer).__mro__):
        return
    rank_zero_warn(
        f"Optimizer states are offloaded to {where}, so {type(optimizer).__name__} runs on the CPU. DeepSpeed's own "
        "optimizers are faster there: deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), ...).",
        stacklevel=user_stacklevel("fabric_deepspeed"),
    )
