"""Let a trained model write: ``python generate.py --prompt "class "``."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import torch

from fabric_core import Fabric
from model import GPT, GPTConfig


def main(options: Namespace) -> None:
    """Build the model that the checkpoint describes, fill it and print what it writes."""
    fabric = Fabric(devices=1)
    fabric.seed_everything(options.seed, verbose=False)
    checkpoint = fabric.load(options.checkpoint)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    model = fabric.setup(model.eval())
    model.mark_forward_method("generate")

    prompt = torch.tensor([list(options.prompt.encode())], device=fabric.device)
    text = model.generate(prompt, options.length, temperature=options.temperature)
    print(bytes(text[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    parser = ArgumentParser(description="Let a trained model write.", formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/language_model/model.ckpt"))
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--length", type=int, default=500, help="bytes to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1: safer; above: more surprising")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
