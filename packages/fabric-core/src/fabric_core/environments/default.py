"""A lone machine, or a few of them started by hand: Fabric starts the processes."""

from __future__ import annotations

from typing import Any, ClassVar

from fabric_core import settings
from fabric_core.abc.environment import ClusterEnvironment
from fabric_core.distributed.port import ReservedPort, reserve_port
from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_core.rank_zero import rank_zero_only
from fabric_core.settings import Setting
from fabric_core.warnings import possible_user_warning


class LightningEnvironment(ClusterEnvironment):
    """The environment where nothing else is detected. Ranks are told by the strategy, not read from a scheduler.

    With ``LOCAL_RANK`` set, the processes were started by hand or by the script launcher, and Fabric starts none.
    For several nodes set ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK`` on each and start the script there.
    """

    priority: ClassVar[int] = 0

    def __init__(self) -> None:
        self._world_size = 1
        self._global_rank = 0
        self._port: int | None = None
        self._reserved: ReservedPort | None = None
        if not self.creates_processes_externally and _seen_of_scheduler():
            possible_user_warning(_several_tasks(), stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reserved": None}  # the reservation stays with the process that made it

    @staticmethod
    def detect() -> bool:
        """Always: it is the fall-back."""
        return True

    @property
    def creates_processes_externally(self) -> bool:
        """Whether ``LOCAL_RANK`` says that this process was started as one of several."""
        return settings.LOCAL_RANK.is_set()

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``, else this machine."""
        return settings.MASTER_ADDR.text() or "127.0.0.1"

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, else ``STANDALONE_PORT``, else a free port that is reserved while this object lives.

        Raises:
            RuntimeError: neither is set on a node other than the first.
        """
        given = settings.MASTER_PORT.integer() or settings.STANDALONE_PORT.integer()
        if given is not None:
            return given
        if self.node_rank() > 0:
            raise UsageError(
                f"This is node {self.node_rank()}, which cannot know the port that rank 0 listens on: set MASTER_ADDR "
                "and MASTER_PORT to the same values on every node, MASTER_ADDR to the address of node 0."
            )
        if self._port is None:
            self._reserved = reserve_port()
            self._port = self._reserved.port
        return self._port

    def world_size(self) -> int:
        """What the strategy said; 1 before."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Remember the number of processes."""
        self._world_size = size

    def global_rank(self) -> int:
        """What the strategy said; 0 before."""
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        """Remember the rank, also for functions that run on rank 0 only."""
        self._global_rank = rank
        rank_zero_only.rank = rank

    def local_rank(self) -> int:
        """``LOCAL_RANK``, else 0."""
        return settings.LOCAL_RANK.integer() or 0

    def node_rank(self) -> int:
        """``NODE_RANK``, else ``GROUP_RANK``, else 0."""
        return settings.NODE_RANK.integer() or settings.GROUP_RANK.integer() or 0

    def local_world_size(self) -> int | None:
        """``LOCAL_WORLD_SIZE``, if processes were started from outside."""
        return settings.LOCAL_WORLD_SIZE.integer() if self.creates_processes_externally else None

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse several nodes that cannot find each other, and another number of processes than were started.

        Raises:
            ValueError: says what to set.
            RuntimeError: a scheduler has started this program several times, and each would start all processes.
        """
        if num_devices * num_nodes > 1 and not self.creates_processes_externally and _seen_of_scheduler():
            raise UsageError(_several_tasks())
        if num_nodes > 1 and not (settings.MASTER_ADDR.is_set() and settings.MASTER_PORT.is_set()):
            raise InvalidArgumentError(
                f"num_nodes={num_nodes}, but MASTER_ADDR and MASTER_PORT are not both set, so the nodes cannot find "
                "each other. On every node, set them to the address of node 0 and a free port there, and count the "
                "nodes: MASTER_ADDR=10.0.0.1 MASTER_PORT=29400 NODE_RANK=0 python train.py. Or type on every node: "
                f"fabric run --num-nodes {num_nodes} --node-rank 0 --main-address 10.0.0.1 train.py"
            )
        if not self.creates_processes_externally:
            return
        for setting, asked in (settings.LOCAL_WORLD_SIZE, num_devices), (settings.WORLD_SIZE, num_devices * num_nodes):
            started = setting.integer()
            if started is not None and started != asked:
                raise InvalidArgumentError(
                    f"Fabric was asked for devices={num_devices} and num_nodes={num_nodes}, but LOCAL_RANK says that "
                    f"the processes were started already, and {setting.name}={started} that there are {started} where "
                    f"{asked} were expected. Start as many as asked for, or ask for those there are: "
                    'Fabric(devices="auto"). If none were started, unset LOCAL_RANK.'
                )

    def teardown(self) -> None:
        """Give the port back. Variables stay: they tell a rank its place for as long as the other processes live."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = self._port = None


def _several_tasks() -> str:
    """What to say where this is one of several tasks that do not know of each other."""
    variables = ", ".join(f"{setting.name}={setting.text()}" for setting in _seen_of_scheduler())
    return (
        f"A scheduler seems to have started this program as one of several tasks ({variables}), but the environment "
        "for this scheduler is not available in this version: each task would be a job of its own. Start one task per "
        "node that starts the processes, such as `srun --ntasks-per-node=1 torchrun ...`, or pass "
        "Fabric(plugins=YourClusterEnvironment()). If this is the only task, unset these variables."
    )


def _seen_of_scheduler() -> tuple[Setting, ...]:
    """The variables that tell of several tasks, none if there is one task or no scheduler."""
    named = settings.SLURM_JOB_NAME.text() not in ("bash", "interactive")
    if named and settings.SLURM_PROCID.is_set() and _several(settings.SLURM_NTASKS):
        return settings.SLURM_NTASKS, settings.SLURM_PROCID
    if settings.LSB_JOBID.is_set() and settings.JSM_NAMESPACE_RANK.is_set():
        return settings.LSB_JOBID, settings.JSM_NAMESPACE_RANK
    return tuple(setting for setting in (settings.OMPI_COMM_WORLD_SIZE, settings.PMI_SIZE) if _several(setting))


def _several(setting: Setting) -> bool:
    text = setting.text() or ""
    return text.isdigit() and int(text) > 1


def find_free_network_port() -> int:
    """A port that was free a moment ago; ``STANDALONE_PORT`` if set.

    Another program may take it before it is used. ``fabric_core.distributed.port.reserve_port`` prevents that.
    """
    given = settings.STANDALONE_PORT.integer()
    if given is not None:
        return given
    with reserve_port() as reserved:
        return reserved.port
