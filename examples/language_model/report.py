"""What is left when the run is over: the losses as numbers and as a picture."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

Curve = list[tuple[int, float]]
"""Pairs of a step and the loss at that step, in nats per byte."""


def write_losses(path: Path, train: Curve, validation: Curve) -> None:
    """Write both curves as JSON, every digit kept, so that two runs can be compared exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"train": train, "validation": validation}))


def smooth(curve: Curve, reach: int) -> Curve:
    """The mean of each point and its neighbours, up to ``reach`` on both sides, fewer at the beginning."""
    losses = [loss for _, loss in curve]
    reaches = (min(reach, place) for place in range(len(losses)))
    windows = (losses[place - near : place + near + 1] for place, near in enumerate(reaches))
    return [(step, sum(window) / len(window)) for (step, _), window in zip(curve, windows, strict=True)]


def draw_losses(path: Path, train: Curve, validation: Curve) -> str:
    """Draw both curves into a PNG and return a sentence about it; without matplotlib, the sentence says what to do."""
    if not find_spec("matplotlib"):
        return "No picture of the losses: pip install matplotlib"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    calm = smooth(train, reach=len(train) // 40)
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(*zip(*calm, strict=True), color="tab:blue", label=f"training, smoothed: {calm[-1][1]:.2f} at the end")
    label = f"validation: {validation[-1][1]:.2f} at the end"
    axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label=label)
    axes.set(title="A byte-level GPT learns Python", xlabel="optimizer step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"The loss curve is in {path}"
