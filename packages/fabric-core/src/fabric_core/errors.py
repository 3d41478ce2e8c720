"""Every error that Fabric raises on purpose, as one tree. Each also is the builtin that callers already catch.

FabricError
├── InvalidArgumentError (ValueError)        a value out of range, an unknown word, arguments that contradict each other
│   └── MisconfigurationException            the same, under the name existing programs catch
├── InvalidTypeError (TypeError)             an argument of a type that cannot work
├── UsageError (RuntimeError)                a call at the wrong time or in the wrong order
├── UnsupportedError (NotImplementedError)   a combination that a backend does not offer
├── CheckpointError (RuntimeError)           a checkpoint that cannot be written or is damaged
│   ├── UnsafeCheckpointError (UnpicklingError)  reading it would run code
│   └── CheckpointKeyError (KeyError)        keys asked for that the checkpoint does not hold, or the other way round
├── NoLoggerError (IndexError)               ``fabric.logger`` without any logger
├── WorkerFailedError (RuntimeError)         a worker process failed; holds the first failure
└── PluginError                              a plugin cannot be found or used
    ├── UnknownPluginError (ValueError, KeyError)
    ├── AmbiguousPluginError (ValueError)
    ├── IncompatiblePluginError (RuntimeError)
    ├── PluginLoadError (ImportError)
    └── PluginBlockedError (RuntimeError)
"""

from __future__ import annotations

from pickle import UnpicklingError


class FabricError(Exception):
    """The root of all errors that Fabric raises on purpose."""


class InvalidArgumentError(FabricError, ValueError):
    """An argument has a value that cannot work, alone or together with another one."""


class MisconfigurationException(InvalidArgumentError):  # noqa: N818 - the name that existing programs catch
    """Arguments contradict each other or the machine."""


class InvalidTypeError(FabricError, TypeError):
    """An argument has a type that cannot work."""


class UsageError(FabricError, RuntimeError):
    """A call came at the wrong time or in the wrong order."""


class UnsupportedError(FabricError, NotImplementedError):
    """The chosen backend does not offer what was asked for."""


class CheckpointError(FabricError, RuntimeError):
    """A checkpoint could not be written, or is damaged."""


class UnsafeCheckpointError(CheckpointError, UnpicklingError):
    """The file holds more than tensors and plain values; building that runs code, which was not allowed."""


class CheckpointKeyError(CheckpointError, KeyError):
    """The keys asked for and the keys in the checkpoint differ."""

    __str__ = Exception.__str__  # KeyError would show the message with quotes and escapes


class WorkerFailedError(FabricError, RuntimeError):
    """A worker process failed. The message holds the first failure's traceback, with its rank and host.

    Attributes:
        exit_code: what the first failed worker ended with; 128 + N when signal N ended it.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class PluginError(FabricError):
    """The root of all errors about finding or using plugins."""


class UnknownPluginError(PluginError, ValueError, KeyError):
    """No installed distribution registers the name."""

    __str__ = Exception.__str__


class AmbiguousPluginError(PluginError, ValueError):
    """Several distributions register the name; the message holds the qualified spellings that choose one."""


class IncompatiblePluginError(PluginError, RuntimeError):
    """The plugin was written for another version of the contract or of the core."""


class PluginLoadError(PluginError, ImportError):
    """Importing the plugin failed; the original error is chained."""


class PluginBlockedError(PluginError, RuntimeError):
    """The plugin is installed, but a switch (``FABRIC_PLUGINS`` and its kin) keeps it out."""


class NoLoggerError(FabricError, IndexError):
    """A logger was asked for, and none was given."""
