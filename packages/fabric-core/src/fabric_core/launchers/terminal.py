"""Who gets a Ctrl-C."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def typed_at_terminal() -> bool:
    """Whether a Ctrl-C at the terminal reaches the workers by itself, because it goes to this whole process group."""
    if sys.platform == "win32":
        return True
    with suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    return False
