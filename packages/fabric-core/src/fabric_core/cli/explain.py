"""``fabric explain``: what a run would use, and why."""

from __future__ import annotations

import json
import sys
from typing import Any

import click


@click.command()
@click.option("--accelerator", help="As Fabric(accelerator=...).")
@click.option("--strategy", help="As Fabric(strategy=...).")
@click.option("--devices", help="As Fabric(devices=...), per node.")
@click.option("--num-nodes", "--num_nodes", type=int, help="As Fabric(num_nodes=...).")
@click.option("--precision", help="As Fabric(precision=...).")
@click.option("--checkpoint-io", "--checkpoint_io", help="As Fabric(checkpoint_io=...).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def explain(as_json: bool, **options: Any) -> None:
    """Show the plan that these options and the environment lead to, with the origin and reason of every value."""
    from fabric_core.resolve.pipeline import resolve

    plan = resolve({name: value for name, value in options.items() if value is not None})
    sys.stdout.write((json.dumps(plan.as_dict(), indent=2) if as_json else plan.explain()) + "\n")
