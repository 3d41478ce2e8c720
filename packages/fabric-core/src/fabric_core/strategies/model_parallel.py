"""The user's own way of splitting a module: tensor parallel, FSDP, or both, on a mesh of two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fabric_core.distributed.group import DEFAULT_TIMEOUT
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UsageError
from fabric_core.rank_zero import rank_zero_only
from fabric_core.strategies.sharded.agreement import make_equal
from fabric_core.strategies.sharded.base import Compile, ShardedStrategy
from fabric_core.strategies.sharded.groups import fsdp_modules, mesh_of, parameter_groups
from fabric_core.strategies.sharded.materialize import materialize_sharded
from fabric_core.strategies.sharded.meshes import World, check_engine, new_mesh
from fabric_core.warnings import possible_user_warning

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Size = int | Literal["auto"]
DATA, TENSOR = "data_parallel", "tensor_parallel"


class ModelParallelStrategy(ShardedStrategy):
    """Splits a module with a function of the user's, called once at set-up on every rank.

    The function gets the module and a ``DeviceMesh`` with the dimensions ``"data_parallel"`` and
    ``"tensor_parallel"``, applies ``parallelize_module`` and ``fully_shard`` to what it wants, and returns the module.
    The ranks of one data-parallel group see different data, those of one tensor-parallel group the same.

    Modules on the meta device get memory afterwards, each process for its parts, and the values that their
    ``reset_parameters()`` draw, the same for any number of processes. Parameters that the function leaves alone are
    those of rank 0.

    Args:
        parallelize_fn: ``(module, mesh) -> module``.
        data_parallel_size: how many groups with data of their own; ``"auto"``: the number of nodes.
        tensor_parallel_size: how many processes share the data; ``"auto"``: the number of processes per node.
        save_distributed_checkpoint: ``fabric.save`` writes a folder to which each rank adds its parts; otherwise one
            file with all in it.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...
        timeout: how long a collective waits for the other ranks.
        **parts: ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io`` and ``precision``, as
            for every strategy.
    """

    precision_family: ClassVar[str | None] = "model_parallel"

    def __init__(
        self,
        parallelize_fn: Callable[[nn.Module, DeviceMesh], nn.Module],
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        **parts: Any,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **parts)
        if not callable(parallelize_fn):
            raise InvalidTypeError(
                f"ModelParallelStrategy(parallelize_fn={parallelize_fn!r}): expected a function that takes the module "
                "and a device mesh, and returns the module."
            )
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and not (type(size) is int and size >= 1):
                raise InvalidArgumentError(f'ModelParallelStrategy({name}={size!r}): expected "auto" or 1 or more.')
        self.parallelize_fn = parallelize_fn
        self.data_parallel_size: Size = data_parallel_size
        self.tensor_parallel_size: Size = tensor_parallel_size
        self.state_dict_type: Literal["full", "sharded"] = "sharded" if save_distributed_checkpoint else "full"
        self._mesh: DeviceMesh | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh with the dimensions ``"data_parallel"`` and ``"tensor_parallel"``.

        Raises:
            RuntimeError: before ``fabric.launch()``.
        """
        if self._mesh is None:
            raise UsageError("ModelParallelStrategy.device_mesh is there after fabric.launch(), not before.")
        return self._mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each data-parallel group takes its share of the data; all ranks of a tensor-parallel group the same."""
        data = self.device_mesh[DATA]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    def build_meshes(self) -> None:
        """Make the mesh of both sizes.

        Raises:
            RuntimeError: the sizes do not multiply to the number of processes.
        """
        data = self.num_nodes if self.data_parallel_size == "auto" else self.data_parallel_size
        tensor = self.num_processes if self.tensor_parallel_size == "auto" else self.tensor_parallel_size
        if data * tensor != self.world_size:
            raise UsageError(
                f"data_parallel_size={data} ({_origin(self.data_parallel_size)}) times tensor_parallel_size={tensor} "
                f"({_origin(self.tensor_parallel_size)}) is {data * tensor}, but there are {self.world_size} "
                f"processes: {self.num_nodes} nodes with {self.num_processes} each. Pass sizes whose product is "
                f"{self.world_size}."
            )
        world = World(self.root_device.type, self.num_nodes, self.num_processes, self.timeout)
        self._mesh = new_mesh((data, tensor), world, (DATA, TENSOR))

    def teardown(self) -> None:
        """Leave the process group, and with it the mesh."""
        self._mesh = None
        super().teardown()

    def shard(self, module: nn.Module, compile: Compile | None) -> nn.Module:
        """Make ranks equal, run the user's function, give memory to what is on the meta device, and compile.

        Raises:
            TypeError: the module holds parts that the older FSDP wraps, or the function returns no module.
        """
        _refuse_wrapped_fsdp(module)
        make_equal(_plain_tensors(module), self.root_device)
        result = self.parallelize_fn(module, self.device_mesh)
        if not isinstance(result, nn.Module):
            raise InvalidTypeError(
                f"The parallelize_fn of ModelParallelStrategy returned {type(result).__name__} instead of the module. "
                "End it with: return module."
            )
        _refuse_wrapped_fsdp(result)
        for group in (group for unit in fsdp_modules(result) for group in parameter_groups(unit)):
            check_engine(self.root_device.type, mesh_of(group).ndim)
        materialize_sharded(result, self.root_device)
        self._warn_of_unsynchronised(result)
        if compile is not None:
            for unit in _units(result):
                compile(unit)
        return result

    def _warn_of_unsynchronised(self, module: nn.Module) -> None:
        if self.device_mesh[DATA].size() == 1 or rank_zero_only.rank:
            return
        names = [name for name, p in module.named_parameters() if p.requires_grad and not self._is_synchronised(p)]
        if names and not any(isinstance(part, DistributedDataParallel) for part in module.modules()):
            listing = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            possible_user_warning(
                f"Nobody exchanges the gradients of these parameters between the {self.device_mesh[DATA].size()} "
                f"data-parallel groups, so that their values drift apart: {listing}. Apply "
                'fully_shard(module, mesh=mesh["data_parallel"]) in the parallelize_fn, or freeze them.'
            )

    def _is_synchronised(self, parameter: Tensor) -> bool:
        """Whether the parameter is a DTensor on a mesh that reaches over several data-parallel groups."""
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            return False
        tensor_parallel_size = self.device_mesh[TENSOR].size()
        return len({rank // tensor_parallel_size for rank in mesh.mesh.flatten().tolist()}) > 1


def _origin(size: Size) -> str:
    return '"auto"' if size == "auto" else "as passed"


def _plain_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that have memory and are not split."""
    from torch.distributed.tensor import DTensor

    tensors = [*module.parameters(), *module.buffers()]
    return [t for t in tensors if not t.is_meta and not isinstance(t, DTensor)]


def _refuse_wrapped_fsdp(module: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    named = module.named_modules()
    wrapped = [name or "the module itself" for name, part in named if isinstance(part, FullyShardedDataParallel)]
    if wrapped:
        raise InvalidTypeError(
            f"ModelParallelStrategy cannot work with FullyShardedDataParallel, which wraps: {', '.join(wrapped)}. Use "
            "torch.distributed.fsdp.fully_shard in the parallelize_fn instead."
        )


def _units(module: nn.Module) -> list[nn.Module]:
    """What is compiled: the innermost FSDP units, or the whole module if there are none."""
    units: list[Any] = fsdp_modules(module)
    return [unit for unit in units if len(fsdp_modules(unit)) == 1] or [module]
