"""The categories of Fabric's warnings, and the switches for warnings about likely mistakes."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from fabric_core.settings import POSSIBLE_USER_WARNINGS

_PACKAGE = __name__.partition(".")[0]


class PossibleUserWarning(UserWarning):
    """Something is probably not as intended, but may be: these warnings have a switch of their own."""


class FabricDeprecationWarning(DeprecationWarning):
    """Something public will go away in a coming version."""


LightningDeprecationWarning = FabricDeprecationWarning
"""The name that existing programs filter by."""


def possible_user_warning(message: str, stacklevel: int = 1) -> None:
    """Warn with ``PossibleUserWarning``, unless the variable ``POSSIBLE_USER_WARNINGS`` is ``0`` or ``off`` right now.

    ``stacklevel`` counts as in ``warnings.warn``: 1 names the line that calls this function, 2 its caller's. Every
    process that calls this warns; a caller that runs on all ranks asks ``rank_zero_only.rank`` first.
    """
    if POSSIBLE_USER_WARNINGS.flag():
        warnings.warn(message, PossibleUserWarning, stacklevel=stacklevel + 1)


def user_stacklevel(package: str = _PACKAGE) -> int:
    """The ``stacklevel`` with which the calling function, if it warns, names the first line that is the user's.

    For code that is reached by ways of different length; where there is one way, a number says it better.

    Args:
        package: the plugin that warns; its lines are passed over like those of core.
    """
    inside = (f"{_PACKAGE}.", f"{package}.")
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def disable_possible_user_warnings(module: str = "") -> None:
    """From now on no ``PossibleUserWarning`` is shown for modules whose name ``module``, a regex, matches at its start.

    The default matches all. ``warnings.resetwarnings()`` or the end of a ``warnings.catch_warnings()`` block undoes it.
    """
    warnings.filterwarnings("ignore", category=PossibleUserWarning, module=module)
