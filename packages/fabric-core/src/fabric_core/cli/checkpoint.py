"""``fabric checkpoint``: what a checkpoint holds, and other forms of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from fabric_core.cli.progress import byte_bar, errors_shown, readable_size

if TYPE_CHECKING:
    from fabric_core.checkpoint.conversion.describe import Description, TensorRow

_DTYPES: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
}
_weights_only = click.option(
    "--no-weights-only", is_flag=True, help="Run code from the checkpoint: only for those you trust."
)
_force = click.option("--force", is_flag=True, help="Replace what is at the target.")


@click.group()
def checkpoint() -> None:
    """Look into checkpoints, and change their form."""


@checkpoint.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--verify", is_flag=True, help="Read all of it, and compare sizes, hashes and checksums.")
@click.option("--keys", is_flag=True, help="Show every tensor with its shape and dtype.")
@click.pass_context
def inspect(ctx: click.Context, path: str, as_json: bool, verify: bool, keys: bool) -> None:
    """Show what the checkpoint PATH holds: a file, a sharded folder, a safetensors file, or what a plugin reads.

    No tensor is loaded and no code from the checkpoint is run, whoever wrote it. With --verify, the command ends with 1
    if anything is damaged.
    """
    from fabric_core.checkpoint.conversion.describe import describe
    from fabric_core.checkpoint.conversion.verify import verify as compare

    with errors_shown():
        damages, compared = compare(path) if verify else (None, "")
        facts = None if damages else describe(path)
    if as_json:
        click.echo(json.dumps(_as_dict(path, facts, damages, compared, keys), indent=2))
    else:
        sections = [] if facts is None else [_card(facts), _parts(facts), *([_keys(facts)] if keys else [])]
        if damages is not None:
            sections.append("\n".join(["DAMAGED:", *damages]) if damages else f"Not damaged. Compared: {compared}.")
        click.echo("\n\n".join(sections))
    ctx.exit(1 if damages else 0)


@checkpoint.command()
@click.argument("source")
@click.argument("target")
@click.option("--to", type=click.Choice(["file", "sharded", "safetensors"]), help="Default: as TARGET's name says.")
@click.option("--key", metavar="NAME", help="The module to take the weights of; for weights without a name, theirs.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="What the weights of modules become.")
@_force
@_weights_only
def convert(source: str, target: str, force: bool, no_weights_only: bool, **options: str | None) -> None:
    """Write the checkpoint SOURCE in another form, tensor by tensor.

    TARGET is a safetensors file if its name ends so, a single file if it ends in .ckpt, .pt, .pth or .bin, and a
    sharded folder if it ends in a slash. A safetensors file holds the weights of one module: name it with --key if
    SOURCE has several.
    """
    from fabric_core.checkpoint.conversion.convert import Conversion, convert, exists, format_of

    with errors_shown("--no-weights-only"):
        to = options["to"] or format_of(target)
        if _same(source, target):
            raise click.UsageError("TARGET is SOURCE: give it another name.")
        if not force and exists(target.rstrip("/")):
            raise click.ClickException(f"{target!r} exists. Pass --force to replace it; nothing was written.")
        dtype = None if options["dtype"] is None else _torch_dtype(options["dtype"])
        wish = Conversion(source, target, to, options["key"], dtype, weights_only=not no_weights_only)
        left_out = convert(wish, byte_bar)
    if left_out:
        click.echo(f"Left out, because it is no tensor: {', '.join(left_out)}", err=True)
    click.echo(f"Written: {target}", err=True)


@checkpoint.command()
@click.argument("folder")
@click.option("--output", help='The file to write. Default: FOLDER with ".consolidated" added.')
@_force
@_weights_only
def consolidate(folder: str, output: str | None, force: bool, no_weights_only: bool) -> None:
    """Write the checkpoint FOLDER as a single file, which torch.load and fabric.load read.

    FOLDER is a sharded checkpoint, or one of a layout that an installed plugin reads.
    """
    from fabric_core.cli.consolidate import run

    run(folder, output, "--output", force=force, weights_only=not no_weights_only)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, _DTYPES[name])


def _same(one: str, other: str) -> bool:
    if "://" in one or "://" in other:
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


def _as_dict(
    path: str, facts: Description | None, damages: list[str] | None, compared: str, keys: bool
) -> dict[str, Any]:
    content: dict[str, Any] = {"path": path}
    if facts is not None:
        content = {name: value for name, value in asdict(facts).items() if name != "rows"}
        content |= {"tensors": len(facts.stored), "elements": facts.elements, "nbytes": facts.nbytes}
        content["dtypes"] = facts.dtypes
    if facts is not None and keys:
        content["keys"] = [asdict(row) for row in facts.rows]
    if damages is not None:
        content |= {"damages": damages, "compared": compared}
    return content


def _card(facts: Description) -> str:
    tied = len(facts.rows) - len(facts.stored)
    lines = {
        "format": facts.format,
        "written by": facts.written_by or "not recorded",
        "processes": "not recorded" if facts.world_size is None else str(facts.world_size),
        "tensors": f"{len(facts.stored):,}" + (f", and {tied:,} tied to one of them" if tied else ""),
        "elements": f"{facts.elements:,}",
        "size": readable_size(facts.nbytes),
        "dtypes": ", ".join(f"{dtype} ({count:,})" for dtype, count in facts.dtypes.items()) or "none",
    }
    return "\n".join([facts.path, *(f"{label + ':':<12}{text}" for label, text in lines.items())])


def _parts(facts: Description) -> str:
    rows = [("NAME", "KIND", "TENSORS", "ELEMENTS", "SIZE")]
    for part in facts.parts:
        size = readable_size(part.nbytes) if part.tensors else ""
        counts = (f"{part.tensors:,}", f"{part.elements:,}") if part.tensors else ("", "")
        rows.append((part.name or "(all)", part.kind, *counts, size))
    return _table(rows)


def _keys(facts: Description) -> str:
    return _table([("KEY", "SHAPE", "DTYPE", "SIZE"), *map(_key, facts.rows)])


def _key(row: TensorRow) -> tuple[str, ...]:
    size = readable_size(row.nbytes) if row.tied_to is None else f"as {row.tied_to}"
    return row.name, "x".join(map(str, row.shape)) or "scalar", row.dtype, size


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
