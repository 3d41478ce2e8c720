"""Processes started by torchrun, or by `fabric run`, which follows the same contract."""

from __future__ import annotations

from fabric_core import settings
from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_core.settings import Setting


class TorchElasticEnvironment(ClusterEnvironment):
    """Reads what torchrun puts into every process: ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ..."""

    @staticmethod
    def detect() -> bool:
        """Whether ``TORCHELASTIC_RUN_ID`` is set."""
        return settings.TORCHELASTIC_RUN_ID.is_set()

    @property
    def creates_processes_externally(self) -> bool:
        """Always: torchrun has started them."""
        return True

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``, else this machine."""
        return settings.MASTER_ADDR.text() or "127.0.0.1"

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, else 12910, so that processes that were not told agree without talking."""
        return settings.MASTER_PORT.integer() or 12910

    def world_size(self) -> int:
        """``WORLD_SIZE``."""
        return _required(settings.WORLD_SIZE)

    def set_world_size(self, size: int) -> None:
        """Nothing: torchrun knows."""

    def global_rank(self) -> int:
        """``RANK``."""
        return _required(settings.RANK)

    def set_global_rank(self, rank: int) -> None:
        """Nothing: torchrun knows."""

    def local_rank(self) -> int:
        """``LOCAL_RANK``."""
        return _required(settings.LOCAL_RANK)

    def node_rank(self) -> int:
        """``GROUP_RANK``, else 0."""
        return settings.GROUP_RANK.integer() or 0

    def local_world_size(self) -> int | None:
        """``LOCAL_WORLD_SIZE``."""
        return settings.LOCAL_WORLD_SIZE.integer()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse another number of processes than torchrun has started."""
        started = self.world_size()
        if num_devices * num_nodes != started:
            raise InvalidArgumentError(
                f"Fabric was asked for devices={num_devices} and num_nodes={num_nodes}, which is "
                f"{num_devices * num_nodes} processes, but {started} were started. Start them with "
                f"`fabric run --devices {num_devices} --num-nodes {num_nodes}` or `torchrun --nproc-per-node "
                f'{num_devices} --nnodes {num_nodes}`, or leave the choice to the command line: Fabric(devices="auto").'
            )


def _required(setting: Setting) -> int:
    value = setting.integer()
    if value is None:
        raise UsageError(
            f"{setting.name} is not set, though torchrun sets it in every process ({setting.doc}). "
            "Start the program with torchrun or `fabric run`."
        )
    return value
