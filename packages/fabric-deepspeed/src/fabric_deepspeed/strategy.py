"""DeepSpeed's ZeRO as a strategy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core import settings
from fabric_core.distributed.group import DEFAULT_TIMEOUT
from fabric_core.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError, UsageError
from fabric_core.precision import Precision
from fabric_core.strategies import ParallelStrategy
from fabric_deepspeed.backend import (
    check_dtype,
    check_first_devices,
    check_release,
    load,
    start_communication,
    visibility_variables,
)
from fabric_deepspeed.checkpoint.covers import DeepSpeedCovers
from fabric_deepspeed.clipping import clip_next_step, clips_in_its_step
from fabric_deepspeed.config.document import advise_on_offload, assemble, config_keywords, finalize, zero_stage
from fabric_deepspeed.config.typed import remember_typed
from fabric_deepspeed.engine import Engine, build_engine, destroy_engine
from fabric_deepspeed.gradient_sync import EngineGradientSync
from fabric_deepspeed.gradients import retain_graph
from fabric_deepspeed.initialising import split_while_building
from fabric_deepspeed.live_engines import LiveEngines
from fabric_deepspeed.precision import DeepSpeedPrecision
from fabric_deepspeed.process_state import configure_activation_checkpointing, shared_state, stop_profiler_ranges

if TYPE_CHECKING:
    from fabric_core.abc.accelerator import Accelerator
    from fabric_core.abc.environment import ClusterEnvironment


class DeepSpeedStrategy(DeepSpeedCovers, ParallelStrategy):
    """DeepSpeed's ZeRO: optimizer states (stage 1), gradients too (2), parameters too (3) split over processes.

    A model and its one optimizer are set up together, and then belong to a DeepSpeed engine, which runs backward and
    step. ``fabric.backward``, ``optimizer.step``, ``zero_grad``, ``fabric.no_backward_sync`` and
    ``fabric.clip_gradients(max_norm=...)`` do what they do under ddp; what an engine cannot do is an error. Several
    models have an engine each: ``fabric.backward(loss, model=model)``. An engine lives until ``fabric.teardown()``.

    The arguments become DeepSpeed's dictionary, ``config``, with its names where they differ; see its documentation
    for what they do. A dictionary or file of your own may say more. Where both speak and differ, it is an error.

    Args:
        accelerator: the kind of device.
        zero_optimization: ``False`` for stage 0, plain data parallelism.
        stage: what is split, 0 to 3.
        remote_device: where ``init_module`` keeps parameters at stage 3, if the dictionary does not say.
        offload_optimizer: keep optimizer states off the device: ``offload_optimizer_device``,
            ``optimizer_buffer_count``, ``pin_memory``.
        offload_parameters: keep parameters off the device, at stage 3: ``offload_params_device``,
            ``params_buffer_count``, ``params_buffer_size``, ``max_in_cpu``, ``pin_memory``.
        nvme_path: the folder for what is offloaded to ``"nvme"``, with ``block_size``, ``queue_depth``,
            ``single_submit``, ``overlap_events`` and ``thread_count`` for its input and output.
        sub_group_size: how many parameters are updated at a time, at stage 3.
        contiguous_gradients: copy gradients into one buffer as they come; ``overlap_comm``, ``allgather_partitions``,
            ``reduce_scatter``, ``allgather_bucket_size`` and ``reduce_bucket_size`` say how they travel.
        zero_allow_untested_optimizer: accept optimizers that DeepSpeed has not been tested with.
        logging_batch_size_per_gpu: the batch size in DeepSpeed's log; it changes nothing else.
        config: a dictionary, a ``DeepSpeedConfig``, or the path of a JSON file; else ``PL_DEEPSPEED_CONFIG_PATH``.
        logging_level: of DeepSpeed's own log.
        parallel_devices: the devices of this node.
        cluster_environment: who starts the processes.
        loss_scale: for float16; 0 adapts it, as ``initial_scale_power``, ``loss_scale_window``, ``hysteresis`` and
            ``min_loss_scale`` say.
        partition_activations: of layers run by ``deepspeed.checkpointing.checkpoint``: split what is kept for backward;
            ``cpu_checkpointing``, ``contiguous_memory_optimization``, ``synchronize_checkpoint_boundary``.
        load_full_weights: accepted; every kind of checkpoint is recognised by itself.
        precision: the dtypes.
        process_group_backend: ``"gloo"``, ``"nccl"``, ...
        timeout: how long a collective waits for the other ranks.
        exclude_frozen_parameters: do not save parameters that are not trained.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: its release is too old.
        ValueError: an argument contradicts the configuration.
    """

    setup_mode: ClassVar[Literal["either", "joint", "separate"]] = "joint"
    precision_family: ClassVar[str | None] = "deepspeed"
    supported_accelerators: ClassVar[frozenset[str] | None] = frozenset(
        {"cpu", "cuda", "generic", "hpu", "mlu", "npu", "sdaa", "supa", "xpu"}
    )

    typed_arguments: frozenset[str]

    # fmt: off
    @remember_typed
    def __init__(  # noqa: PLR0913, PLR0917 - the arguments that existing programs pass
        self, accelerator: Accelerator | None = None, zero_optimization: bool = True, stage: int = 2,
        remote_device: str | None = None, offload_optimizer: bool = False, offload_parameters: bool = False,
        offload_params_device: str = "cpu", nvme_path: str = "/local_nvme", params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000, max_in_cpu: int = 1_000_000_000, offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4, block_size: int = 1_048_576, queue_depth: int = 8,
        single_submit: bool = False, overlap_events: bool = True, thread_count: int = 1, pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000, contiguous_gradients: bool = True, overlap_comm: bool = True,
        allgather_partitions: bool = True, reduce_scatter: bool = True, allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000, zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: int | None = None, config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        logging_level: int = logging.WARNING, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, loss_scale: float = 0, initial_scale_power: int = 16,
        loss_scale_window: int = 1000, hysteresis: int = 2, min_loss_scale: int = 1,
        partition_activations: bool = False, cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False, synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False, precision: Precision | None = None, process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT, exclude_frozen_parameters: bool = False,
    ) -> None:
    # fmt: on
        self._keywords = config_keywords(locals())
        check_release()
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.config = assemble(config, self._keywords, self.typed_arguments)
        self.remote_device = remote_device
        self.logging_level = logging_level
        self.load_full_weights = load_full_weights
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self._forget()

    def _forget(self) -> None:
        self._deepspeed: ModuleType | None = None
        self._live = LiveEngines()
        self._undo = ExitStack()
        self.gradient_sync: EngineGradientSync = EngineGradientSync(self._live)

    def __getstate__(self) -> dict[str, Any]:
        live = ("_deepspeed", "_live", "_undo", "gradient_sync")
        return {name: value for name, value in super().__getstate__().items() if name not in live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def zero_stage_3(self) -> bool:
        """Whether the parameters themselves are split over processes."""
        return zero_stage(self.config) == 3

    @property
    def engines(self) -> list[Engine]:
        """The live engines, in the order in which they were set up."""
        return list(self._live)

    @property
    def model(self) -> Engine | None:
        """The engine that was set up last, ``None`` if there is none."""
        engines = self.engines
        return engines[-1] if engines else None

    @property
    def deepspeed(self) -> ModuleType:
        """The package, once this process has joined the others."""
        if self._deepspeed is None:
            raise UsageError("DeepSpeedStrategy has not joined the other processes yet: call fabric.launch() first.")
        return self._deepspeed

    def connect(
        self, *, devices: list[torch.device], num_nodes: int, environment: ClusterEnvironment, interactive: bool
    ) -> None:
        """Take devices and environment; processes are started by running the script again."""
        super().connect(devices=devices, num_nodes=num_nodes, environment=environment, interactive=interactive)
        self.launcher = self.script_launcher()

    def setup_environment(self) -> None:
        """Import DeepSpeed, join the process group, and have DeepSpeed use it.

        Raises:
            ImportError: DeepSpeed, or a native part of it, cannot be loaded.
            RuntimeError: it works on another kind of device in this process, or cannot address these devices.
            NotImplementedError: it does not compute in this precision here.
            TypeError: the precision is not one for DeepSpeed.
        """
        if not isinstance(self.precision, DeepSpeedPrecision) and type(self.precision) is not Precision:
            raise InvalidTypeError(
                f"DeepSpeedStrategy was given {type(self.precision).__name__} as precision. DeepSpeed casts and scales "
                'by itself: pass a name, such as precision="bf16-mixed", or a DeepSpeedPrecision.'
            )
        deepspeed = load(self.root_device.type)
        check_first_devices(self.parallel_devices or [], visibility_variables(deepspeed))
        check_dtype(deepspeed, self.precision.compute_dtype)
        super().setup_environment()
        self._deepspeed = deepspeed
        self._finalize_config()
        shared_state.enter(self.logging_level)
        self._undo.callback(shared_state.leave)
        self._tell_environment()
        start_communication(deepspeed, self.process_group_backend)
        configure_activation_checkpointing(deepspeed, self.config)

    def _finalize_config(self) -> None:
        before = self.config
        self.config = finalize(before, self._keywords, self.typed_arguments, precision=self.precision.precision)

        def restore() -> None:
            self.config = before  # the next Fabric may choose another precision

        self._undo.callback(restore)

    def _tell_environment(self) -> None:
        """Write the variables that DeepSpeed reads, where the launcher has not."""
        environment = self.cluster_environment
        assert environment is not None
        for setting, value in {
            settings.MASTER_ADDR: environment.main_address,
            settings.MASTER_PORT: environment.main_port,
            settings.RANK: self.global_rank,
            settings.LOCAL_RANK: self.local_rank,
            settings.WORLD_SIZE: self.world_size,
        }.items():
            if not setting.is_set():
                setting.set(value)
                self._undo.callback(setting.unset)

    def teardown(self) -> None:
        """Destroy the engines, put back what DeepSpeed changed in this process, and leave the process group.

        Modules that were set up cannot be used any more; at stage 3 their parameters stay split.
        """
        with ExitStack() as stack:
            stack.callback(super().teardown)
            stack.push(self._undo)
            for engine in self.engines:
                stack.callback(destroy_engine, engine)
            self._forget()

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """An engine around the module that owns the optimizer. Every rank calls it.

        The optimizer stays the object that it was: its groups hold DeepSpeed's split copies of the parameters from now
        on, and their learning rates are those that are used. A scheduler that is passed is stepped by the engine,
        after each step: do not step it, too.

        Raises:
            ValueError: not exactly one optimizer.
        """
        if len(optimizers) != 1:
            raise InvalidArgumentError(
                f"fabric.setup(model, ...) was given {len(optimizers)} optimizers, and DeepSpeed takes one optimizer "
                "for each model. Use one with several groups: Adam([{'params': first, 'lr': 0.1}, {'params': others}])."
            )
        optimizer = optimizers[0]
        advise_on_offload(self.config, optimizer)
        frozen = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
        engine = build_engine(self.deepspeed, module, optimizer, scheduler, self.config)
        self._live.add(engine, trains=True, frozen=frozen)
        return engine, [optimizer], scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """An engine without an optimizer, for inference; at stage 3 the parameters are split. Every rank calls it."""
        engine: nn.Module = build_engine(self.deepspeed, module, None, None, self.config)
        self._live.add(engine, trains=False)
        return engine

    def setup_compiled(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any, compile: Callable[[Any], Any]
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Compile the module's forward, inside the engine. What DeepSpeed does around it is not compiled."""
        if optimizers:
            engine, optimizers, scheduler = self.setup_module_and_optimizers(module, optimizers, scheduler)
        else:
            engine = self.setup_module(module)
        stop_profiler_ranges()
        module.forward = compile(module.forward)
        return engine, optimizers, scheduler

    def module_to_device(self, module: nn.Module) -> None:
        """Move parameters and buffers, in place, unless the parameters are split already."""
        if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            super().module_to_device(module)

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """New parameters are on the device, in the precision's dtype; at stage 3 each layer is split at once."""
        with ExitStack() as stack:
            stack.enter_context(super().module_init_context(empty_init))
            if self.zero_stage_3:
                stack.enter_context(split_while_building(self.deepspeed, self.config, self.remote_device))
            yield

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Backward through the engine that the loss comes from.

        Args:
            tensor: the loss, one number.
            module: the engine; needed where several are set up for training.
            *args: of ``Tensor.backward``: nothing but ``retain_graph`` is possible.
            **kwargs: ``retain_graph=True``.

        Raises:
            RuntimeError: no model was set up with an optimizer, or gradients of the last call would be lost.
            ValueError: several models were, and none is named; the tensor is no loss.
            NotImplementedError: another argument of ``Tensor.backward``.
        """
        self._live.backward(tensor, module, retain_graph(args, kwargs) if args or kwargs else False)

    def step_target(self, optimizer: Optimizer) -> Any:
        """The engine that owns the optimizer, with what is known of its gradients."""
        return self._live.of(optimizer, "optimizer.step()")

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> None:
        """Step the engine.

        Raises:
            RuntimeError: inside ``no_backward_sync``.
            NotImplementedError: a closure was passed.
        """
        if kwargs.get("closure") is not None:
            raise UnsupportedError(
                "optimizer.step(closure): DeepSpeed's engine has one backward pass for each step, so it cannot call a "
                "closure. Call fabric.backward(loss), then optimizer.step()."
            )
        optimizer.step()

    def zero_grad(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Forget the gradients since the last step, wherever DeepSpeed keeps them."""
        self._live.of(optimizer, "optimizer.zero_grad()").discard()

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Have the next step clip to ``max_norm``; return the norm before, shape ``()``, float32. Every rank calls it.

        With stage 0 in single precision gradients are clipped at once, by any norm.
        """
        gradients = self._live.of(optimizer, "fabric.clip_gradients()")
        if clips_in_its_step(gradients):
            return clip_next_step(gradients, max_norm, norm_type, error_if_nonfinite)
        gradients.complete("fabric.clip_gradients()")
        return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """``NotImplementedError``, except with stage 0 in single precision, where gradients are whole and at hand."""
        gradients = self._live.of(optimizer, "fabric.clip_gradients()")
        if clips_in_its_step(gradients):
            raise UnsupportedError(
                "fabric.clip_gradients(clip_val=...): DeepSpeed splits gradients before the step, and clips them by "
                'norm alone. Pass max_norm=..., or set "gradient_clipping" in its config.'
            )
        gradients.complete("fabric.clip_gradients()")
        super().clip_gradients_value(module, optimizer, clip_val)
