"""The command line of the training program."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import GPTConfig

FABRIC_OPTIONS = ("accelerator", "devices", "num_nodes", "precision", "strategy")


def fabric_options(options: Namespace) -> dict[str, Any]:
    """The arguments of `Fabric` among ``options``: only those that were typed."""
    return {name: value for name, value in vars(options).items() if name in FABRIC_OPTIONS}


def parse_options() -> Namespace:
    """What the user typed. Options for Fabric that were not typed are left to it, or to ``fabric run``."""
    parser = ArgumentParser(
        description="Teach a small GPT to write Python.", formatter_class=ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("where to run").add_argument
    for name in FABRIC_OPTIONS:
        add(f"--{name.replace('_', '-')}", default=SUPPRESS, help=f"see Fabric({name}=...)")
    add("--threads", type=int, default=1, help="CPU threads per process; more only help a larger model on idle cores")
    add = parser.add_argument_group("what to learn").add_argument
    add("--data", type=Path, help="folder of text files instead of the standard library")
    add("--steps", type=int, default=600)
    add("--batch-size", type=int, default=16, help="windows per step, over all processes")
    add("--accumulate", type=int, default=1, help="small batches per step and process")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("size of the model").add_argument
    for name, default in asdict(GPTConfig()).items():
        add(f"--{name.replace('_', '-')}", type=type(default), default=default)
    add = parser.add_argument_group("what to write, and when").add_argument
    add("--out", type=Path, default=Path("runs/language_model"), help="folder for all files of this run")
    add("--losses", type=Path, help="file for the losses (in --out if not given)")
    add("--checkpoint", type=Path, help="the checkpoint (in --out if not given)")
    add("--checkpoint-every", type=int, default=200, help="steps between checkpoints; 0: only at the end")
    add("--resume", action="store_true", help="go on from --checkpoint")
    add("--stop-after", type=int, help="stop early, after this many steps, to be resumed")
    add("--eval-every", type=int, default=100, help="steps between validations")
    add("--eval-batches", type=int, default=10, help="batches in a validation")
    options = parser.parse_args()
    options.losses = options.losses or options.out / "losses.json"
    options.checkpoint = options.checkpoint or options.out / "model.ckpt"
    return options
