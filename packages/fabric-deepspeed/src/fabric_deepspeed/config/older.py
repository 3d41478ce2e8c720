"""Keys of old, as they are called now."""

from __future__ import annotations

from typing import Any, Final

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.keywords import Path
from fabric_deepspeed.config.tree import check_sections, lookup, put, remove

_RENAMED: Final[dict[Path, Path]] = {
    ("bfloat16",): ("bf16",),
    ("aio", "thread_count"): ("aio", "intra_op_parallelism"),
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): (
        "zero_optimization",
        "stage3_gather_16bit_weights_on_model_save",
    ),
}
_SWITCHES: Final = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}


def modernize(document: dict[str, Any]) -> None:
    """Rename in place what DeepSpeed has renamed; a key given under both names has to say the same."""
    _zero_as_switch(document)
    check_sections(document, "zero_optimization", "aio")
    for old, new in _RENAMED.items():
        if (value := lookup(document, old)) is not None:
            _move(document, old, new, value)
    zero = document.get("zero_optimization") or {}
    for name, section in _SWITCHES.items():
        if name in zero:
            _offload_switch(document, name, section, zero[name])
    _pinning(zero)


def _zero_as_switch(document: dict[str, Any]) -> None:
    zero = document.get("zero_optimization")
    if isinstance(zero, bool):
        document["zero_optimization"] = {"stage": int(zero)}
        if zero and "allgather_size" in document:
            document["zero_optimization"]["allgather_bucket_size"] = document.pop("allgather_size")


def _move(document: dict[str, Any], old: Path, new: Path, value: Any) -> None:
    current = lookup(document, new)
    if current is not None and current != value:
        raise InvalidArgumentError(
            f"DeepSpeed's configuration says {'.'.join(old)}={value!r}, and under its present name "
            f"{'.'.join(new)}={current!r}: keep the latter."
        )
    remove(document, old)
    put(document, new, value)


def _offload_switch(document: dict[str, Any], name: str, section: str, on: Any) -> None:
    path = ("zero_optimization", section)
    current = lookup(document, (*path, "device"))
    if current is not None and (current != "none") != bool(on):
        raise InvalidArgumentError(
            f"DeepSpeed's configuration says zero_optimization.{name}={on!r}, and under its present name "
            f"{'.'.join(path)}.device={current!r}: keep the latter."
        )
    remove(document, ("zero_optimization", name))
    if on and current is None:
        put(document, (*path, "device"), "cpu")


def _pinning(zero: dict[str, Any]) -> None:
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    if pinned is None:
        return
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(name), dict):
            zero[name].setdefault("pin_memory", pinned)
