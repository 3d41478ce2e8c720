"""``fabric plugins``: what is installed, read from metadata. No plugin is imported, and neither is torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click
from click.shell_completion import CompletionItem

from fabric_core.registry import PluginRef, get_registry
from fabric_core.registry.ref import GROUPS, dist_key, name_key

_kind = click.option("--kind", type=click.Choice(list(GROUPS)), help="Only plugins of this kind.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def plugins() -> None:
    """Show which plugins are installed and which can be used."""


@plugins.command("list")
@_kind
@_json
def list_(kind: str | None, as_json: bool) -> None:
    """List every plugin with its origin, and why it cannot be used by its plain name, if so."""
    refs = get_registry().refs(kind)
    click.echo(_to_json(refs) if as_json else _table(refs))


def _complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    refs = get_registry().refs(ctx.params.get("kind"))
    return [CompletionItem(name) for ref in refs for name in ref.names if name.startswith(incomplete)]


@plugins.command()
@click.argument("name", shell_complete=_complete_name)
@_kind
@_json
def show(name: str, kind: str | None, as_json: bool) -> None:
    """Show everything known about the plugins called NAME, which may be "distribution::name"."""
    registry = get_registry()
    found = [ref for ref in registry.refs(kind) if _answers_to(ref, name)]
    if not found:
        raise registry.unknown(name, kind)
    click.echo(_to_json(found) if as_json else "\n\n".join(map(_card, found)))


def _answers_to(ref: PluginRef, text: str) -> bool:
    dist, _, name = text.rpartition("::")
    if dist and dist_key(dist) != dist_key(ref.dist):
        return False
    return name_key(name) in map(name_key, ref.names)


def _to_json(refs: Sequence[PluginRef]) -> str:
    import json

    return json.dumps([{**asdict(ref), "qualified": ref.qualified} for ref in refs], indent=2)


def _table(refs: Sequence[PluginRef]) -> str:
    rows = [("KIND", "NAME", "FROM", "STATUS")]
    rows += [(ref.kind, ", ".join(ref.names), ref.origin, _status(ref)) for ref in refs]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows)


def _card(ref: PluginRef) -> str:
    facts = {
        "kind": ref.kind,
        "name": ref.name,
        "aliases": ", ".join(ref.aliases),
        "from": ref.origin,
        "target": ref.value,
        "status": _status(ref),
        "pass": ref.name if ref.status == "ok" else ref.qualified,
    }
    return "\n".join(f"{label + ':':<9}{value}" for label, value in facts.items() if value)


def _status(ref: PluginRef) -> str:
    return f"{ref.status}: {ref.reason}" if ref.reason else ref.status
