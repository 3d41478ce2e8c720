"""What the user sees while the model learns: a live bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any


class Progress(AbstractContextManager["Progress"]):
    """Shows nothing: what every process but the first uses."""

    def __init__(self, first: int, last: int, tokens_per_step: int) -> None:
        self.first, self.last, self.tokens_per_step = first, last, tokens_per_step
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        """Leave the output as it is."""

    def update(self, step: int, loss: float) -> None:
        """Tell that ``step`` steps are done and what the last one's loss was."""

    def note(self, text: str) -> None:
        """Say something worth keeping on the screen."""

    def speed(self, step: int) -> float:
        """Tokens per second since the beginning, over all processes."""
        return (step - self.first) * self.tokens_per_step / (time.perf_counter() - self.began)


class Lines(Progress):
    """Prints a line every twentieth of the way, for logs and pipes."""

    def update(self, step: int, loss: float) -> None:
        """Print, if a twentieth of the way has passed."""
        if step % max(self.last // 20, 1) == 0 or step == self.last:
            self.note(f"step {step:>6}/{self.last}   loss {loss:.3f}   {self.speed(step):,.0f} tokens/s")

    def note(self, text: str) -> None:
        """Print at once, also into a pipe."""
        print(text, flush=True)


class Bar(Progress):
    """A progress bar with the loss, the speed and the time left, drawn by rich."""

    def __init__(self, first: int, last: int, tokens_per_step: int) -> None:
        super().__init__(first, last, tokens_per_step)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = TextColumn("loss {task.fields[loss]:.3f}"), TextColumn("{task.fields[speed]:,.0f} tokens/s")
        self.rich: Any = RichProgress(BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn())
        self.task = self.rich.add_task("training", total=last, completed=first, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Bar:
        self.rich.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.rich.stop()

    def update(self, step: int, loss: float) -> None:
        """Move the bar."""
        self.rich.update(self.task, completed=step, loss=loss, speed=self.speed(step))

    def note(self, text: str) -> None:
        """Print above the bar."""
        self.rich.console.print(text, highlight=False)


def progress(first: int, last: int, tokens_per_step: int, visible: bool) -> Progress:
    """The best display for this process and this output."""
    kind = Progress if not visible else Bar if sys.stdout.isatty() and find_spec("rich") else Lines
    return kind(first, last, tokens_per_step)
