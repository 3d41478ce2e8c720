"""What a cluster, a scheduler or a launching tool must tell about the processes of a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class ClusterEnvironment(ABC):
    """Where the other processes are and who starts them.

    Reading from it has no effect: no getter writes an environment variable.

    Attributes:
        fabric_api: the contract level the class was written for.
        priority: order of detection, highest first; the fall-back for a lone machine is 0.
    """

    fabric_api: ClassVar[str] = "1"
    priority: ClassVar[int] = 10

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Whether this process runs in such an environment."""

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether every rank is started by something else, so that Fabric launches nothing."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Address of rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """Port of rank 0. Free at least until rank 0 listens on it."""

    @abstractmethod
    def world_size(self) -> int:
        """Number of processes in all."""

    @abstractmethod
    def set_world_size(self, size: int) -> None:
        """Tell the environment, if it does not know by itself."""

    @abstractmethod
    def global_rank(self) -> int:
        """Rank among all processes."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """Tell the environment, if it does not know by itself."""

    @abstractmethod
    def local_rank(self) -> int:
        """Rank among the processes of this node."""

    @abstractmethod
    def node_rank(self) -> int:
        """Rank of this node."""

    def local_world_size(self) -> int | None:
        """Number of processes on this node, ``None`` if it is for Fabric to decide. ``devices="auto"`` follows it."""
        return None

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """``ValueError`` if the job was started with another number of processes than is asked for."""

    def teardown(self) -> None:
        """Undo what the environment changed, such as variables it wrote."""
