"""The environment variable that this package writes, for the length of one import."""

from __future__ import annotations

from typing import Final

from fabric_core.settings import Setting

NO_WELCOME: Final = Setting("BITSANDBYTES_NOWELCOME", "1: bitsandbytes prints nothing when it is imported")
