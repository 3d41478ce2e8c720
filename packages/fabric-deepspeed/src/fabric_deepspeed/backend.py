"""The one place that imports DeepSpeed: for one kind of device, without a word, and with clear errors."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from types import ModuleType
from typing import Any, Final

import torch

from fabric_core.errors import IncompatiblePluginError, PluginLoadError, UnsupportedError, UsageError
from fabric_deepspeed.build_locks import abandoned_locks
from fabric_deepspeed.settings import ACCELERATOR

OLDEST: Final = "0.19.8"
"""The oldest release that this package works with, as its metadata says too."""

NEWEST: Final = "0.19.8"
"""The newest release that it was tested with."""

LOGGER: Final = "DeepSpeed"
"""The name of DeepSpeed's own logger. It writes to stdout."""


def load(device_type: str | None = None) -> ModuleType:
    """DeepSpeed, imported to work on devices of this type; ``None`` takes what it chose or chooses itself.

    DeepSpeed decides at its first import which kind of device a process works on, and never again.

    Raises:
        ImportError: it is not installed, or importing it failed; the cause is chained.
        RuntimeError: its release is too old, or it works on another kind of device in this process.
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:
        check_release()
        deepspeed = _import(device_type)
    chosen = deepspeed.accelerator.get_accelerator()._name
    if device_type is not None and chosen != device_type:
        raise UsageError(
            f"DeepSpeed works on {chosen!r} in this process, and cannot change that, but {device_type!r} is asked for "
            f"now. It was imported before, by the program or for another Fabric. Use accelerator={chosen!r}, start "
            f"another process, or set {ACCELERATOR.name}={device_type} before DeepSpeed is imported."
        )
    return deepspeed


def check_release() -> None:
    """``ImportError`` if DeepSpeed is not installed, ``RuntimeError`` if its release is too old. Imports nothing."""
    if not _installed():
        raise PluginLoadError("The strategy needs DeepSpeed, which is not installed: pip install deepspeed")
    from packaging.version import Version

    try:
        found = version("deepspeed")
    except PackageNotFoundError:  # a source tree on the path: trust it
        return
    if Version(found).release < Version(OLDEST).release:
        raise IncompatiblePluginError(
            f"DeepSpeed {found} is installed, and fabric-deepspeed needs {OLDEST} or newer: "
            f"pip install --upgrade 'deepspeed>={OLDEST}'"
        )


def kept_elsewhere(what: str) -> IncompatiblePluginError:
    """The error where an attribute of DeepSpeed's own, which it may move in any release, is not there."""
    return IncompatiblePluginError(
        f"DeepSpeed {sys.modules['deepspeed'].__version__} keeps {what} elsewhere than the releases that "
        f"fabric-deepspeed was tested with, {OLDEST} to {NEWEST}: pip install 'deepspeed>={OLDEST},<={NEWEST}'"
    )


def _installed() -> bool:
    try:
        return find_spec("deepspeed") is not None
    except (ImportError, ValueError):  # somebody keeps it from being imported
        return False


def _import(device_type: str | None) -> ModuleType:
    before = ACCELERATOR.text()
    given = before or None
    if given is not None and device_type is not None and given != device_type:
        raise UsageError(
            f"The environment says {ACCELERATOR.name}={given}, but the devices chosen are of type {device_type!r}. "
            f"Unset the variable, or choose the devices that it names: Fabric(accelerator={given!r}, ...)."
        )
    if device_type is not None:
        ACCELERATOR.set(device_type)
    try:
        with _quiet():
            return importlib.import_module("deepspeed")
    except Exception as error:
        raise PluginLoadError(
            f"DeepSpeed is installed, but importing it for devices of type {device_type or 'its own choice'!r} failed: "
            f"{type(error).__name__}: {error}. Nothing else is affected; other strategies work."
        ) from error
    finally:
        if before is None:
            ACCELERATOR.unset()
        else:
            ACCELERATOR.set(before)


def start_communication(deepspeed: ModuleType, process_group_backend: str) -> None:
    """Have DeepSpeed use the process group that this process is in. Every rank calls it.

    Raises:
        ImportError: a native part could not be built or loaded; the cause is chained.
    """
    for lock in abandoned_locks():
        warnings.warn(
            f"A build of one of DeepSpeed's native parts was interrupted and left its lock behind. Whoever needs that "
            f"part waits for it without end. If no build is running, remove {lock}",
            stacklevel=2,
        )
    try:
        with _quiet(), silenced(), _without_inference_collectives():
            deepspeed.init_distributed(
                dist_backend=process_group_backend, dist_init_required=False, auto_mpi_discovery=False, verbose=False
            )
            _leave_deprecated_names(deepspeed)
    except Exception as error:
        raise PluginLoadError(
            "DeepSpeed could not build or load one of its native parts: "
            f"{type(error).__name__}: {error}. Building needs a C++ compiler (g++), ninja on PATH and py-cpuinfo: "
            "pip install ninja py-cpuinfo"
        ) from error


def _leave_deprecated_names(deepspeed: ModuleType) -> None:
    """Have DeepSpeed call torch's collectives by the names that they have now, instead of warning at every place."""
    backend = deepspeed.comm.comm.cdb
    for attribute, name in (
        ("all_gather_function", "all_gather_single"),
        ("reduce_scatter_function", "reduce_scatter_single"),
    ):
        if hasattr(backend, attribute) and hasattr(torch.distributed, name):
            setattr(backend, attribute, getattr(torch.distributed, name))


@contextmanager
def _without_inference_collectives() -> Iterator[None]:
    """On CPUs, DeepSpeed would compile a shared-memory all-reduce, for half a minute, that only its inference uses."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build


def check_first_devices(devices: Sequence[torch.device], variable: str) -> None:
    """``RuntimeError`` unless process n has device n: DeepSpeed takes the local rank for the index of the device.

    Args:
        devices: of this node, in order of local rank; those without an index are all the same one.
        variable: the environment variable that chooses which devices a process sees.
    """
    indices = [device.index for device in devices]
    if None not in indices and indices != list(range(len(indices))):
        wanted = ",".join(map(str, indices))
        raise UsageError(
            f"devices={indices}: DeepSpeed gives process n the device n, so it uses the first {len(indices)} devices "
            f"that it sees. Let it see those that you mean, {variable}={wanted}, and pass devices={len(indices)}."
        )


def check_dtype(deepspeed: ModuleType, dtype: torch.dtype) -> None:
    """``NotImplementedError`` if DeepSpeed does not compute in ``dtype`` on the devices of this process."""
    accelerator = deepspeed.accelerator.get_accelerator()
    supported: list[torch.dtype] = accelerator.supported_dtypes()
    if dtype not in supported:
        raise UnsupportedError(
            f"DeepSpeed does not compute in {dtype} on this {accelerator._name} device, but in "
            f'{", ".join(map(str, supported))}. Pass another precision, such as precision="bf16-true" or "32-true".'
        )


def visibility_variables(deepspeed: ModuleType) -> str:
    """The environment variable that hides devices from a process, such as ``CUDA_VISIBLE_DEVICES``."""
    names: list[str] = deepspeed.accelerator.get_accelerator().visible_devices_envs()
    return names[0]


def silenced() -> AbstractContextManager[Any]:
    """What DeepSpeed prints on stdout, past its log, is not shown."""
    return redirect_stdout(StringIO())


def _quiet() -> AbstractContextManager[None]:
    """DeepSpeed's log shows warnings and errors only, whatever level it sets meanwhile."""
    return _log_without_others(_is_serious)


def without_notice_of_optimizer() -> AbstractContextManager[None]:
    """DeepSpeed does not say that it does not know the optimizer: the strategy allows every one."""
    return _log_without_others(_is_no_notice)


@contextmanager
def _log_without_others(wanted: Callable[[Any], bool]) -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _is_no_notice(record: Any) -> bool:
    return "ZeRO with an untested optimizer" not in str(record.msg)


def _is_serious(record: Any) -> bool:
    return bool(record.levelno >= logging.WARNING)
