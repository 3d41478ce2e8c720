"""What has become of an engine's gradients since its last step, so that each call does what it does elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor

from fabric_core.errors import InvalidArgumentError, UnsupportedError, UsageError
from fabric_deepspeed.arrivals import watch_epilogue
from fabric_deepspeed.engine import Engine, added_group
from fabric_deepspeed.split_gradients import clear_offloaded, clear_parts, forget_arrivals

_ACCUMULATE: Final = (
    "To accumulate gradients, run all backward passes but the last of a step under fabric.no_backward_sync(model), or "
    'set "gradient_accumulation_steps" in DeepSpeed\'s config and call optimizer.step() after each.'
)


class Gradients:
    """The gradients of one engine that trains.

    DeepSpeed exchanges gradients in the backward pass that is at a boundary: by default every one.

    Attributes:
        engine: whose gradients they are.
        stage: ZeRO's.
        managed: DeepSpeed counts backward passes; otherwise its step is the boundary, whatever was before.
        pending: the last backward pass only accumulated; the exchange between processes is still to come.
        ready: gradients are exchanged and wait for the step.
        touched: a backward pass through another engine may have reached these parameters.
        left: such a pass has left gradients here, at stages 1 and 2.
        waiting: the last step was none, because the engine accumulates over more backward passes.
        held_back: inside ``no_backward_sync``.
        undo_clipping: puts back what ``clip_gradients`` set for the next step.

    Args:
        engine: whose gradients they are.
        frozen: parameters that the optimizer was given, and that were frozen when DeepSpeed laid out its weights.
    """

    def __init__(self, engine: Engine, frozen: Sequence[Tensor] = ()) -> None:
        self.engine = engine
        self.stage = int(engine.zero_optimization_stage())
        self.managed = bool(getattr(engine, "managed_gradient_accumulation", lambda: True)())
        # Without ZeRO, newer releases divide float16 gradients by the loss scale and do not multiply the loss by it.
        self._scales_loss = self.stage == 0 and engine.fp16_enabled() and not hasattr(engine, "_do_optimizer_backward")
        self.pending = False
        self.ready = False
        self.touched = False
        self.left = False
        self.waiting = False
        self.held_back = False
        self.undo_clipping: Callable[[], None] | None = None
        laid_out = engine.optimizer is not engine.basic_optimizer
        self._groups = len(engine.basic_optimizer.param_groups) if laid_out else None
        self._frozen = list(frozen) if laid_out else []
        self._driven = False
        if self.stage in (1, 2):
            watch_epilogue(engine.optimizer, weakref.WeakMethod(self._arrives))

    def _arrives(self, anything: bool) -> bool:
        """Told at the end of each backward pass whether it has reached parameters here; whether to take that up."""
        self.left = self.left or (anything and not self._driven)
        return anything or self._driven

    def hold_back(self, held_back: bool) -> None:
        """Whether backward passes only accumulate from now on, or exchange where the engine counts the boundary."""
        self.held_back = held_back
        engine = self.engine
        engine.set_gradient_accumulation_boundary(False if held_back else None)
        if not held_back:  # the optimizer has a copy, and would take None for False until the next forward
            tell = getattr(engine.optimizer, "set_gradient_accumulation_boundary", _nothing)
            tell(engine.is_gradient_accumulation_boundary())

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward through the engine."""
        if retain_graph and self.stage == 3:
            raise UnsupportedError(
                "fabric.backward(retain_graph=True): ZeRO stage 3 frees the parameters during backward, so a graph "
                "cannot be gone through twice. Add the losses up and go backward once, or use stage 2."
            )
        if self.ready and self.stage in (1, 2):
            raise UsageError(
                f"fabric.backward() was called again before optimizer.step(): ZeRO stage {self.stage} would drop the "
                f"gradients of the call before. {_ACCUMULATE}"
            )
        if self.left:
            raise UsageError(
                "fabric.backward(): the backward pass through another model has left gradients in this one, and ZeRO "
                f"stage {self.stage} would drop them now. Call zero_grad() of this model's optimizer before, or "
                "requires_grad_(False) of the model while the other one goes backward through it."
            )
        if loss.numel() != 1 or loss.grad_fn is None:
            raise _no_loss(loss)
        engine = self.engine
        last = engine.is_gradient_accumulation_boundary()
        if self._scales_loss:
            loss = loss * engine.optimizer.loss_scale
        self._driven = True
        try:
            engine.backward(loss, retain_graph=retain_graph)
        finally:
            self._driven = False
        _leave_backward(engine.optimizer)
        self.waiting = False
        if self.managed:
            self.ready, self.pending = self.ready or last, not last

    def step(self) -> None:
        """Step the engine, which clears the gradients too."""
        if self.held_back:
            raise UsageError(
                "optimizer.step() was called inside fabric.no_backward_sync(), where gradients are not exchanged. Step "
                "outside of it, or pass enabled=False for the last backward pass of each step."
            )
        engine = self.engine
        if self._groups is not None and len(engine.basic_optimizer.param_groups) != self._groups:
            raise added_group("optimizer.param_groups was changed")
        if any(parameter.requires_grad for parameter in self._frozen):
            raise UsageError(
                "A parameter that was frozen at fabric.setup(model, optimizer) has requires_grad=True now, and "
                "DeepSpeed would not train it: it has laid out the weights that it steps. Leave it trainable at "
                'set-up, in a group of its own whose "lr" is 0.0 until it begins.'
            )
        last = engine.is_gradient_accumulation_boundary()
        if last:
            self.complete("optimizer.step()")
            if self._offloaded and self.stage == 3:
                clear_offloaded(engine.optimizer)
        self.waiting = self.managed and not last
        try:
            engine.step()
        finally:
            if last or not self.managed:
                self._forget()

    def _forget(self) -> None:
        self.ready = self.pending = self.touched = self.left = False
        if self.stage == 3:
            clear_parts(self.engine.optimizer)
        if self.undo_clipping is not None:
            undo, self.undo_clipping = self.undo_clipping, None
            undo()

    def complete(self, call: str) -> None:
        """See to it that there are gradients, exchanged between processes. Every rank calls it.

        Raises:
            RuntimeError: there was no backward pass since the last step; names the ``call`` that needs one.
            NotImplementedError: this release of DeepSpeed cannot do that with gradients that it has offloaded.
        """
        if self.ready or not self.managed:
            return
        if self.touched and self._arrived:
            return
        if not self.pending:
            raise UsageError(
                f"{call} needs gradients, and there was no backward pass since the last step. Call "
                "fabric.backward(loss) first."
            )
        engine = self.engine
        finish = getattr(engine.optimizer, "finalize_gradient_accumulation_boundary", None)
        if self.stage >= 2 and finish is not None:
            finish()
        elif self.stage >= 2 and self._offloaded:
            raise UnsupportedError(
                "All backward passes of this step were run under fabric.no_backward_sync(), and this release of "
                "DeepSpeed cannot take up offloaded gradients later. Run the last one outside, or install a newer "
                "release."
            )
        else:
            with _without_overlap(engine.optimizer):
                engine.allreduce_gradients()
        self.ready, self.pending = True, False

    def discard(self) -> None:
        """Forget all gradients since the last step; not where the engine, asked to step, goes on accumulating."""
        if self.waiting or not (self.ready or self.pending or self.touched):
            return  # the engine clears them in each step, so most calls end here
        engine = self.engine
        optimizer = engine.optimizer
        engine.zero_grad()
        if optimizer is not engine.basic_optimizer:
            optimizer.zero_grad()
        if self.stage in (1, 2):
            for name in ("averaged_gradients", "all_grad_tensors"):
                kept = getattr(optimizer, name, {})
                kept.update(dict.fromkeys(kept))
        if self.stage in (1, 2) and hasattr(optimizer, "micro_step_id"):
            optimizer.micro_step_id = -1
        forget_arrivals(optimizer)
        for name in ("_release_preflattened_grad_buffers", "clear_hp_grads"):
            getattr(optimizer, name, _nothing)()
        if self._offloaded:
            optimizer.reset_cpu_buffers()
        self._forget()

    @property
    def _arrived(self) -> bool:
        """Whether a backward pass through another engine has left exchanged gradients here."""
        kept = getattr(self.engine.optimizer, "averaged_gradients", None) or {}
        return self.left or any(part is not None for part in kept.values())

    @property
    def _offloaded(self) -> bool:
        optimizer = self.engine.optimizer
        return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


def _no_loss(tensor: Tensor) -> Exception:
    if tensor.numel() != 1:
        return InvalidArgumentError(
            f"fabric.backward() was given a tensor of shape {tuple(tensor.shape)}, and DeepSpeed goes backward from "
            "one number alone, shape (). Reduce it: fabric.backward(loss.mean())."
        )
    return InvalidArgumentError(
        "fabric.backward() was given a tensor that no computation with gradients led to. Compute the loss from the "
        "outputs of the module that fabric.setup() returned, outside of torch.no_grad()."
    )


def retain_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The one argument of ``Tensor.backward`` that DeepSpeed takes; ``NotImplementedError`` for the others."""
    given = dict(zip(("gradient", "retain_graph", "create_graph", "inputs"), args, strict=False)) | kwargs
    keep = bool(given.pop("retain_graph", False))
    refused = [name for name, value in given.items() if value is not None and value is not False]
    if refused:
        raise UnsupportedError(
            f"fabric.backward({refused[0]}=...): DeepSpeed's engine runs backward by itself and takes retain_graph "
            "alone. Leave it away, or choose another strategy."
        )
    return keep


def _leave_backward(optimizer: Any) -> None:
    """DeepSpeed enters backward once for each forward of the module that led to the loss, and leaves it once."""
    while getattr(optimizer, "_backward_active_depth", 0) > 0:
        optimizer.exit_backward()


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def _without_overlap(optimizer: Any) -> Iterator[None]:
    """Where gradients travel during backward, the optimizer does not look for others afterwards."""
    before = getattr(optimizer, "overlap_comm", None)
    if before is not None:
        optimizer.overlap_comm = False
    try:
        yield
    finally:
        if before is not None:
            optimizer.overlap_comm = before
