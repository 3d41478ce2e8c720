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


def smooth(curve: Curve, share: float = 0.05) -> Curve:
    """The running mean over the last ``share`` of the curve's length."""
    width = max(1, int(len(curve) * share))
    recent = [curve[max(0, end - width) : end] for end in range(1, len(curve) + 1)]
    return [(window[-1][0], sum(loss for _, loss in window) / len(window)) for window in recent]


def draw_losses(path: Path, train: Curve, validation: Curve) -> str:
    """Draw both curves into a PNG and return a sentence about it; without matplotlib, the sentence says what to do."""
    if not find_spec("matplotlib"):
        return "No picture of the losses: pip install matplotlib"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(
        *zip(*smooth(train), strict=True), color="tab:blue", label=f"training, running mean: {smooth(train)[-1][1]:.2f}"
    )
    last = f"validation: {validation[-1][1]:.2f} at the end"
    axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label=last)
    axes.set(title="A byte-level GPT learns Python", xlabel="optimizer step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"The loss curve is in {path}"
