"""The way to bitsandbytes: imported when a precision is made, quietly, or with an error that says what to do."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

from fabric_bnb.settings import NO_WELCOME
from fabric_core.errors import PluginLoadError

NAME: Final = "bitsandbytes"


def load(device_type: str = "cpu") -> ModuleType:
    """bitsandbytes, imported at the first call and without a word.

    Args:
        device_type: where it is to compute. On the CPU it can do without its native library, elsewhere it cannot.

    Raises:
        PluginLoadError: it is not installed, cannot be imported, or lacks the native library for the device.
    """
    package = sys.modules.get(NAME) or _import()
    if device_type != "cpu":
        check_native_library()
    return package


def check_native_library() -> None:
    """``PluginLoadError`` if bitsandbytes was imported without a native library that fits this machine."""
    extension = importlib.import_module(f"{NAME}.cextension")
    stand_in = getattr(extension, "ErrorHandlerMockBNBNativeLibrary", ())
    if isinstance(extension.lib, stand_in):
        reason = str(getattr(extension.lib, "error_msg", "")).strip()
        raise PluginLoadError(
            f"bitsandbytes has no native library that works with this machine's devices: {reason or 'no reason given'}"
            ". `python -m bitsandbytes` tells what it looked for. Install a release with a library for your version of "
            'CUDA, ROCm or XPU, or use accelerator="cpu".'
        )


def _import() -> ModuleType:
    if importlib.util.find_spec(NAME) is None:
        raise PluginLoadError(
            "Quantised precisions need bitsandbytes, which is not installed: pip install bitsandbytes. Other "
            "precisions work without it."
        )
    try:
        with _quiet():
            return importlib.import_module(NAME)
    except Exception as error:  # native code behind it: anything may come
        raise PluginLoadError(
            f"bitsandbytes is installed, but importing it failed with {type(error).__name__}: {error}. "
            "`python -m bitsandbytes` may tell more. Reinstall it (pip install --force-reinstall --no-deps "
            "bitsandbytes) in a release that fits your torch, or use another precision."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No banner, no warnings and no log lines of bitsandbytes inside the ``with`` block."""
    logger = logging.getLogger(NAME)
    level, welcome = logger.level, NO_WELCOME.text()
    logger.setLevel(logging.CRITICAL)
    NO_WELCOME.set(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if welcome is None:
            NO_WELCOME.unset()
        else:
            NO_WELCOME.set(welcome)
