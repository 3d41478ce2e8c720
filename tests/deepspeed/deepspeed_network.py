"""A small network, its data, and a training loop that runs under any strategy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from fabric_core import Fabric
from fabric_deepspeed import DeepSpeedStrategy

STAGES = [1, 2, 3]
SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Stage 3 keeps small parameters whole, which would be all of those here."""

STEPS, BATCH, INPUTS, OUTPUTS = 20, 16, 8, 4


def half_on_cpu():
    """Whether DeepSpeed trains in float16 here: it asks oneDNN, which asks the processor."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def network(seed=1):
    """Its layers are of sizes that two processes cannot share evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(INPUTS, 33), nn.Tanh(), nn.LayerNorm(33), nn.Linear(33, 15), nn.Tanh(), nn.Linear(15, OUTPUTS)
    )


def batches(steps=STEPS, rank=0, world_size=1, seed=2):
    """Pairs of shape ``(BATCH / world_size, INPUTS)`` and ``(BATCH / world_size, OUTPUTS)``: the rank's share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, BATCH, INPUTS, generator=generator)
    y = torch.tanh(x @ torch.randn(INPUTS, OUTPUTS, generator=generator))
    return list(zip(x[:, rank::world_size], y[:, rank::world_size], strict=True))


def launched(strategy, options=None, **arguments):
    """A Fabric of this pool's two processes.

    Args:
        strategy: a name, or a stage, at which all parameters are split that can be.
        options: more arguments of the strategy, for a stage.
        **arguments: of Fabric.
    """
    if isinstance(strategy, int):
        options = dict(options or {})
        if strategy == 3:
            options["config"] = SPLIT | options.get("config", {})
        strategy = DeepSpeedStrategy(stage=strategy, **options)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **arguments)
    fabric.launch()
    return fabric


def whole(module):
    """The module's full parameters by name, float32 copies on every rank; all ranks must call it."""
    with gathered(module):
        return {name: p.detach().float().clone() for name, p in module.named_parameters()}


def gathered(module):
    """While entered, the parameters are whole."""
    split = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(split)


def apart(a, b):
    """The largest difference between two lists of numbers, or two sets of parameters."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((a[name] - b[name]).abs().max().item() for name in a)
    assert len(a) == len(b)
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        zero_first: gradients are cleared before backward, not after the step.
        marked: accumulating backwards run under ``no_backward_sync``.
        arguments: of the optimizer.
        strategy: arguments of DeepSpeedStrategy; ddp gets none of them.
    """

    precision: str = "32-true"
    optimizer: str = "AdamW"
    accumulate: int = 1
    clip: dict | None = None
    steps: int = STEPS
    zero_first: bool = False
    marked: bool = True
    arguments: dict = field(default_factory=dict)
    strategy: dict = field(default_factory=dict)


def train(strategy, run):
    """Losses over all ranks, gradient norms and full final parameters."""
    fabric = launched(strategy, run.strategy if isinstance(strategy, int) else None, precision=run.precision)
    try:
        return _trained(fabric, run)
    finally:
        fabric.teardown()


def _trained(fabric, run):
    module = network()
    options = {"lr": 0.01, **run.arguments}
    model, optimizer = fabric.setup(module, getattr(torch.optim, run.optimizer)(module.parameters(), **options))
    losses, norms = [], []
    for x, y in batches(run.steps, fabric.global_rank, fabric.world_size):
        total = 0.0
        if run.zero_first:
            optimizer.zero_grad()
        for index, (part, target) in enumerate(zip(x.chunk(run.accumulate), y.chunk(run.accumulate), strict=True)):
            with fabric.no_backward_sync(model, enabled=run.marked and index < run.accumulate - 1):
                loss = (model(part) - target).square().mean() / run.accumulate
                fabric.backward(loss)
            total += loss.item()
        if run.clip is not None:
            norms.append(fabric.clip_gradients(model, optimizer, **run.clip).item())
        optimizer.step()
        if not run.zero_first:
            optimizer.zero_grad()
        losses.append(total)
    return fabric.all_reduce(torch.tensor(losses)).tolist(), norms, whole(module)


def against_ddp(strategy, run, reference=None):
    """How far losses, norms and parameters are from those of ``ddp``, and whether the losses fell."""
    losses, norms, parameters = train("ddp", reference or run)
    ours = train(strategy, run)
    mean = sum((ours[2][name] - p).abs().sum().item() for name, p in parameters.items())
    return {
        "losses": apart(ours[0], losses),
        "norms": apart(ours[1], norms),
        "parameters": apart(ours[2], parameters),
        "mean": mean / sum(p.numel() for p in parameters.values()),
        "fell": ours[0][-1] < 0.5 * ours[0][0],
    }


def message(call, *args, **kwargs):
    """The type and text of the error that a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
