"""What commands that move files show: a bar that says how far they are, and what the system refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from fabric_core.errors import UnsafeCheckpointError


@contextmanager
def byte_bar(size: int) -> Iterator[Callable[[int], object]]:
    """A context for writing ``size`` bytes; gives the function to call with the number that was just written."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    label = f"Writing {readable_size(size)}"
    with click.progressbar(length=size, label=label, file=sys.stderr) as bar:
        yield bar.update


def readable_size(size: float) -> str:
    """``1.5 GB`` for 1500000000."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


@contextmanager
def errors_shown(unsafe_option: str | None = None) -> Iterator[None]:
    """Errors of the system end the command with their message; a traceback would hide it.

    ``unsafe_option`` is what to type for a checkpoint that safe loading refuses.
    """
    try:
        yield
    except UnsafeCheckpointError as error:
        raise click.ClickException(f"{error} Here that is {unsafe_option}." if unsafe_option else str(error)) from error
    except OSError as error:
        raise click.ClickException(str(error)) from error
