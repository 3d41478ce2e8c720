"""The command line of the program."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fabric_core import settings
from model import GPTConfig

FABRIC_OPTIONS = ("accelerator", "devices", "num_nodes", "precision", "strategy")


def fabric_options(options: Namespace) -> dict[str, Any]:
    """The arguments of `Fabric` among ``options``: those that were typed, and the precision."""
    return {name: value for name, value in vars(options).items() if name in FABRIC_OPTIONS}


def parse_options() -> Namespace:
    """What the user typed. Of the options for Fabric, the precision alone has a default here."""
    parser = ArgumentParser(
        description="Freeze a small GPT in 4 bits and train adapters on another text.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("where to run").add_argument
    for name in FABRIC_OPTIONS:
        default = settings.PRECISION.text() or "bnb-nf4" if name == "precision" else SUPPRESS
        add(f"--{name.replace('_', '-')}", default=default, help=f"see Fabric({name}=...)")
    add("--threads", type=int, default=1, help="CPU threads per process")
    add = parser.add_argument_group("the adapters").add_argument
    add("--rank", type=int, default=8, help="features between the two matrices of an adapter")
    add("--alpha", type=float, default=16.0, help="adapters count alpha / rank times")
    add("--dropout", type=float, default=0.0, help="share of the adapters' inputs that training leaves out")
    add = parser.add_argument_group("what to learn").add_argument
    add("--data", type=Path, help="folder of text files instead of Python's documentation")
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=16, help="windows per step, over all processes")
    add("--lr", type=float, default=3e-3, help="learning rate at first; it falls to zero")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("the model below").add_argument
    add("--base", type=Path, help="a checkpoint of the language model's example (in --out if not given)")
    add("--base-steps", type=int, default=250, help="steps to train it for, if there is no such file")
    for name, default in asdict(GPTConfig()).items():
        if name != "dropout":
            add(f"--{name.replace('_', '-')}", type=int, default=default, help="of a model that is trained here")
    add = parser.add_argument_group("what to write, and when").add_argument
    add("--out", type=Path, default=Path("runs/qlora"), help="folder for all files of this run")
    add("--adapters", type=Path, help="the trained adapters (in --out if not given)")
    add("--eval-every", type=int, default=100, help="steps between validations")
    add("--eval-batches", type=int, default=10, help="batches in a validation")
    options = parser.parse_args()
    options.base = options.base or options.out / "base.ckpt"
    options.adapters = options.adapters or options.out / "adapters.ckpt"
    return options
