"""What the registry may ask of this package. Neither torch nor DeepSpeed is imported here."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fabric_core.abc.hooks import hookimpl


@hookimpl
def fabric_environment_report() -> dict[str, Any]:
    """DeepSpeed's release, the kind of device it works on, and what may keep its native parts from being built."""
    from fabric_deepspeed.build_locks import abandoned_locks, extension_folder

    try:
        release = version("deepspeed")
    except PackageNotFoundError:
        release = "not installed"
    return {
        "deepspeed": release,
        "deepspeed accelerator": _accelerator(),
        "deepspeed extensions": str(extension_folder()),
        "deepspeed abandoned locks": [str(lock) for lock in abandoned_locks()],
    }


@hookimpl
def fabric_checkpoint_reader(path: str) -> Any:
    """The reader of DeepSpeed's checkpoints, if the folder is one or is taken for one."""
    from fabric_deepspeed.checkpoint.layout import claims
    from fabric_deepspeed.checkpoint.reader import DeepSpeedReader

    return DeepSpeedReader() if claims(path) else None


def _accelerator() -> str:
    """What DeepSpeed chose in this process; else what the environment tells it to choose at its first import."""
    from fabric_deepspeed.settings import ACCELERATOR

    imported = sys.modules.get("deepspeed.accelerator")
    if imported is not None:
        return str(imported.get_accelerator()._name)
    told = ACCELERATOR.text()
    return "not imported yet" if told is None else f"{told}, by {ACCELERATOR.name}"
