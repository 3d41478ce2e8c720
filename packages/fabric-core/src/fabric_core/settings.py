"""Every environment variable that Fabric reads or writes, declared once.

A setting is read when it is asked for, never at import. ``os.environ`` is touched nowhere else in the package, except
through these objects. The table in the documentation is made from this list.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fabric_core.errors import InvalidArgumentError

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})
_DECLARED: dict[str, Setting] = {}


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, its default and what it is for."""

    name: str
    doc: str
    default: str | None = None

    def __post_init__(self) -> None:
        _DECLARED[self.name] = self

    def text(self) -> str | None:
        """The value as text, the default if the variable is not set."""
        return os.environ.get(self.name, self.default)

    def is_set(self) -> bool:
        """Whether the variable is present in the environment, even if empty."""
        return self.name in os.environ

    def flag(self) -> bool:
        """The value as a switch: ``1 true yes on`` against ``0 false no off`` and the empty text, in any case."""
        text = (self.text() or "").strip().lower()
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        raise InvalidArgumentError(f"{self.name}={text!r} is not a switch: use 1 or 0.")

    def integer(self) -> int | None:
        """The value as a whole number, ``None`` if not set and without a default."""
        text = self.text()
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise InvalidArgumentError(f"{self.name}={text!r} is not a whole number.") from None

    def names(self) -> tuple[str, ...] | None:
        """The value as comma-separated words; ``None`` if not set, ``()`` if set to nothing."""
        text = self.text()
        return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())

    def set(self, value: object) -> None:
        """Write the variable for this process and the processes it starts."""
        os.environ[self.name] = str(value)

    def unset(self) -> None:
        """Remove the variable; no error if it is absent."""
        os.environ.pop(self.name, None)


def child_environment(values: Mapping[Setting, object]) -> dict[str, str]:
    """The environment for a new process: this one's, with ``values`` on top."""
    return {**os.environ, **{setting.name: str(value) for setting, value in values.items()}}


def declared() -> dict[str, Setting]:
    """All settings by variable name."""
    return dict(_DECLARED)


# What `fabric run` was told; each stands in for the constructor argument of the same name.
CLI_USED: Final = Setting("LT_CLI_USED", "1 in processes that `fabric run` started", "0")
ACCELERATOR: Final = Setting("LT_ACCELERATOR", "replaces Fabric(accelerator=...)")
STRATEGY: Final = Setting("LT_STRATEGY", "replaces Fabric(strategy=...)")
DEVICES: Final = Setting("LT_DEVICES", "replaces Fabric(devices=...)")
NUM_NODES: Final = Setting("LT_NUM_NODES", "replaces Fabric(num_nodes=...)")
PRECISION: Final = Setting("LT_PRECISION", "replaces Fabric(precision=...)")

# Which plugins may be used.
DISABLE_PLUGIN_AUTOLOAD: Final = Setting("FABRIC_DISABLE_PLUGIN_AUTOLOAD", "1: only built-in plugins, no scan", "0")
PLUGINS: Final = Setting("FABRIC_PLUGINS", "allow-list of distributions, comma-separated; empty allows none")
PLUGINS_BLOCK: Final = Setting("FABRIC_PLUGINS_BLOCK", "distributions to keep out, comma-separated")
PLUGINS_PREFER: Final = Setting("FABRIC_PLUGINS_PREFER", "who wins a contested name: strategy.x=fabric-foo,...")
PLUGINS_STRICT: Final = Setting("FABRIC_PLUGINS_STRICT", "1: a broken hook module is an error, not a warning", "0")
PLUGINS_TRACE: Final = Setting("FABRIC_PLUGINS_TRACE", "1: say on stderr what the registry does", "0")

# The rendezvous of torch.distributed (its env:// names) and torchrun's additions.
MASTER_ADDR: Final = Setting("MASTER_ADDR", "address of rank 0")
MASTER_PORT: Final = Setting("MASTER_PORT", "port of rank 0")
RANK: Final = Setting("RANK", "rank among all processes")
LOCAL_RANK: Final = Setting("LOCAL_RANK", "rank among the processes of this node")
WORLD_SIZE: Final = Setting("WORLD_SIZE", "number of processes in all")
LOCAL_WORLD_SIZE: Final = Setting("LOCAL_WORLD_SIZE", "number of processes on this node")
NODE_RANK: Final = Setting("NODE_RANK", "rank of this node")
GROUP_RANK: Final = Setting("GROUP_RANK", "rank of this node, as torchrun names it")
TORCHELASTIC_RUN_ID: Final = Setting("TORCHELASTIC_RUN_ID", "set by torchrun and by `fabric run` in every worker")
GROUP_WORLD_SIZE: Final = Setting("GROUP_WORLD_SIZE", "number of nodes, as torchrun names it")
ROLE_NAME: Final = Setting("ROLE_NAME", "torchrun's name for a kind of worker; there is one kind")
ROLE_RANK: Final = Setting("ROLE_RANK", "rank among the workers of one kind, as torchrun names it")
ROLE_WORLD_SIZE: Final = Setting("ROLE_WORLD_SIZE", "number of workers of one kind, as torchrun names it")
TORCHELASTIC_RESTART_COUNT: Final = Setting("TORCHELASTIC_RESTART_COUNT", "how often torchrun restarted the workers")
TORCHELASTIC_MAX_RESTARTS: Final = Setting("TORCHELASTIC_MAX_RESTARTS", "how often torchrun may restart the workers")
WORKER: Final = Setting("FABRIC_WORKER", "how a worker finds its supervisor; written by the launchers for each other")
SPAWN_REPORT: Final = Setting("FABRIC_SPAWN_REPORT", "where a process being spawned reports that it cannot load")
STANDALONE_PORT: Final = Setting("STANDALONE_PORT", "the port to use where a free one would be picked")
SLURM_PROCID: Final = Setting("SLURM_PROCID", "rank among all processes, under srun")
JSM_NAMESPACE_RANK: Final = Setting("JSM_NAMESPACE_RANK", "rank among all processes, under jsrun")
SLURM_NTASKS: Final = Setting("SLURM_NTASKS", "number of tasks, under srun")
SLURM_JOB_NAME: Final = Setting("SLURM_JOB_NAME", "name of the job; bash and interactive are no jobs of several tasks")
LSB_JOBID: Final = Setting("LSB_JOBID", "set in jobs of LSF")
OMPI_COMM_WORLD_SIZE: Final = Setting("OMPI_COMM_WORLD_SIZE", "number of processes, under Open MPI")
PMI_SIZE: Final = Setting("PMI_SIZE", "number of processes, under other kinds of MPI")

# Numerics, seeds, threads, devices.
GLOBAL_SEED: Final = Setting("PL_GLOBAL_SEED", "the seed that seed_everything() set, for other processes")
SEED_WORKERS: Final = Setting("PL_SEED_WORKERS", "1: data loader workers are seeded too", "0")
OMP_NUM_THREADS: Final = Setting("OMP_NUM_THREADS", "threads of each process; set to CPUs per process if not given")
DISABLE_MPS: Final = Setting("DISABLE_MPS", "1: the mps accelerator reports itself as unavailable", "0")
USE_LIBUV: Final = Setting("USE_LIBUV", "set to 0 on Windows, where torch's store is built without libuv")
POSSIBLE_USER_WARNINGS: Final = Setting("POSSIBLE_USER_WARNINGS", "0 or off: no warnings about likely mistakes", "1")
