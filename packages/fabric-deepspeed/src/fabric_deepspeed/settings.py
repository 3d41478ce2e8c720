"""The environment variables of this package, and those of DeepSpeed and torch that it has to look at."""

from __future__ import annotations

from typing import Final

from fabric_core.settings import Setting

CONFIG_PATH: Final = Setting("PL_DEEPSPEED_CONFIG_PATH", "DeepSpeed's JSON file, where the strategy is given no config")
ACCELERATOR: Final = Setting("DS_ACCELERATOR", "the kind of device that DeepSpeed uses, decided when it is imported")
EXTENSIONS_DIR: Final = Setting("TORCH_EXTENSIONS_DIR", "where torch keeps the extensions that DeepSpeed builds")
CACHE_HOME: Final = Setting("XDG_CACHE_HOME", "where caches are kept, those extensions among them")
