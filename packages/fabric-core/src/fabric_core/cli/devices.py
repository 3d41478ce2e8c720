"""Checking the names that were typed, and counting the processes they ask for, with as few imports as possible."""

from __future__ import annotations

from dataclasses import replace

import click

from fabric_core.abc.hooks import ResolveContext
from fabric_core.errors import FabricError, PluginError, UnknownPluginError
from fabric_core.precision.names import full_name
from fabric_core.registry import get_registry


def check_name(kind: str, name: str | None) -> None:
    """Refuse a name that nothing has; no plugin is imported.

    Raises:
        click.UsageError: with the names that exist.
    """
    if name is None or name == "auto":
        return
    registry = get_registry()
    try:
        registry.find(kind, name)
    except PluginError as error:
        existing = ", ".join(registry.names(kind))
        text = str(error) if existing in str(error) else f"{error} Installed: {existing}."
        raise click.UsageError(f"--{kind} {name}: {text}") from None


def check_precision(name: str | None) -> None:
    """Refuse a precision that nothing has; the old short spellings are fine."""
    check_name("precision", None if name is None else full_name(name))


def check_accelerator(name: str | None) -> None:
    """Refuse an accelerator that nothing has; names such as ``gpu``, which several plugins may serve, are fine."""
    try:
        if name is not None and name != "auto":
            get_registry().find("accelerator", name, static=True)
    except UnknownPluginError:
        if name not in _aliases():
            check_name("accelerator", name)


def processes_for(devices: str | None, accelerator: str | None) -> int:
    """How many processes a node runs: as many as devices are named, all that are there, or one if none is typed.

    Raises:
        click.UsageError: not a count, a list of indices, or ``auto``.
    """
    text = "1" if devices is None else devices.strip().lower()
    if text in ("auto", "-1"):
        return max(1, _device_count(accelerator))
    words = [word.strip() for word in text.split(",")]
    indices = [word for word in words if word]
    if not indices or not all(word.isdigit() for word in indices):
        raise click.UsageError(f'--devices {devices}: expected a count "2", a list of indices "0,1", "-1" or "auto".')
    if len(words) > 1:
        return len(indices)
    if int(text) < 1:
        raise click.UsageError(f"--devices {devices} starts no process: ask for at least one.")
    return int(text)


def _device_count(accelerator: str | None) -> int:
    """What ``devices="auto"`` stands for, which only the accelerator knows: chosen as in the workers, with torch."""
    from fabric_core.resolve.accelerator import choose_accelerator
    from fabric_core.resolve.objects import Objects
    from fabric_core.resolve.request import DEFAULTS, Asked, Request

    request = Request.gather(DEFAULTS)
    if accelerator is not None:
        request = replace(request, accelerator=Asked(accelerator, f"--accelerator {accelerator}", True))
    try:
        chosen = choose_accelerator(request, Objects(), get_registry(), ResolveContext())
    except FabricError as error:
        raise click.UsageError(str(error)) from None
    return chosen.value.auto_device_count()


def _aliases() -> frozenset[str]:
    from fabric_core.resolve.candidates import collect_candidates

    offers = collect_candidates(get_registry(), "fabric_accelerator_candidates", ResolveContext())
    return frozenset(alias for offer in offers for alias in offer.aliases)
