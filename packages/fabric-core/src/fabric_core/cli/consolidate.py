"""``fabric consolidate``: a checkpoint that is a folder as one file."""

from __future__ import annotations

import os

import click

from fabric_core.cli.progress import byte_bar, errors_shown


@click.command()
@click.argument("folder")
@click.option("--output-file", "--output_file", help='The file to write. Default: FOLDER with ".consolidated" added.')
@click.option("--no-weights-only", is_flag=True, help="Run code from the checkpoint: only for those you trust.")
def consolidate(folder: str, output_file: str | None, no_weights_only: bool) -> None:
    """Write the checkpoint FOLDER as a single file, which torch.load and fabric.load read.

    FOLDER is what Fabric, Lightning or torch.distributed.checkpoint wrote, on any number of processes, or of a layout
    that an installed plugin reads. One tensor is in memory at a time.
    """
    run(folder, output_file, "--output_file", weights_only=not no_weights_only)


def run(folder: str, output: str | None, option: str, *, weights_only: bool, force: bool = False) -> None:
    """Do it; ``option`` is how another output is asked for.

    ``click.ClickException`` if there is nothing to consolidate, or something is at the output already.
    """
    from fabric_core.checkpoint.conversion.consolidate import consolidate, default_output
    from fabric_core.checkpoint.conversion.convert import exists

    with errors_shown("--no-weights-only"):
        _check(folder)
        output = default_output(folder) if output is None else output
        if not force and exists(output):
            raise click.ClickException(
                f"{output!r} exists. Name another file with {option}, or move that one away first; nothing was written."
            )
        click.echo(f"Written: {consolidate(folder, output, weights_only=weights_only, bar=byte_bar)}", err=True)


def _check(folder: str) -> None:
    from fabric_core.checkpoint.conversion.consolidate import is_folder_checkpoint
    from fabric_core.checkpoint.paths import is_remote, resolve

    if is_folder_checkpoint(folder):
        return
    if is_remote(folder):
        raise click.ClickException(f"There is no sharded checkpoint at {folder!r}.")
    local = resolve(folder)
    if not os.path.exists(local):
        raise click.ClickException(f"There is no folder {local!r} (from {os.getcwd()!r}).")
    what = (
        "holds no sharded checkpoint" if os.path.isdir(local) else "is a file, not the folder of a sharded checkpoint"
    )
    near = [path for path in _neighbours(local) if is_folder_checkpoint(path)]
    hint = f" Did you mean {', '.join(map(repr, near[:3]))}?" if near else ""
    raise click.ClickException(f"{local!r} {what}.{hint}")


def _neighbours(path: str) -> list[str]:
    """The folder that the path lies in, and those that lie in it."""
    inside = sorted(entry.path for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    return [os.path.dirname(os.path.abspath(path)), *inside]
