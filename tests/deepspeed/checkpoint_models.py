"""A network with all that is hard to store, trained a few steps by DeepSpeed or by others, and compared."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fabric_core import Fabric

STAGES = [1, 2, 3]


class Net(nn.Module):
    """Tied weights, frozen ones, a buffer, sizes that two ranks cannot share evenly, and parameters of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.one = nn.Linear(5, 5, bias=False)
        self.two = nn.Linear(5, 5, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full((3,), 0.5))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Counts what it sees."""
        self.seen += 1
        hidden = torch.tanh(self.first(x)) * self.scale
        return self.two(torch.tanh(self.one(self.norm(self.frozen(hidden)))))


def run(pool: Any, function: Any, *args: Any) -> list[Any]:
    """The results by rank. The first call in a pool imports DeepSpeed, which takes long on a busy machine."""
    return pool.run(function, *args, timeout=150.0)  # type: ignore[no-any-return]


def strategy(stage: int, **options: Any) -> Any:
    from fabric_deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(stage=stage, **options)


def launched(how: Any, precision: str = "32-true", devices: int | None = None, **options: Any) -> Fabric:
    """Over the pool's processes; ``how`` is a stage, or another strategy's name."""
    given = strategy(how, **options) if isinstance(how, int) else how
    count = devices or int(os.environ["WORLD_SIZE"])
    fabric = Fabric(accelerator="cpu", devices=count, strategy=given, precision=precision)
    fabric.launch()
    return fabric


def set_up(
    fabric: Fabric, seed: int = 0, kind: str = "AdamW", split_groups: bool = True, weights: Any = None
) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    net = Net()
    if weights is not None:
        net.load_state_dict(weights)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in trained]}]
    if split_groups:
        groups = [
            {"params": [p for name, p in trained if name.endswith("weight")], "lr": 0.05},
            {"params": [p for name, p in trained if not name.endswith("weight")], "lr": 0.1},
        ]
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return fabric.setup(net, getattr(torch.optim, kind)(groups, lr=0.05, **options))


def train(fabric: Fabric, model: Any, optimizer: Any, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last``; the same data for every strategy and number of processes."""
    losses = []
    dtype = next(p.dtype for p in model.parameters())
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 6, generator=generator)[fabric.global_rank :: fabric.world_size].to(dtype)
        loss = model(x).float().square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return losses


def outputs(weights: dict[str, Any]) -> torch.Tensor:
    """What a plain network with these weights says."""
    net = Net()
    net.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    )
    return net(torch.linspace(-1, 1, 12).view(2, 6)).detach()


def whole(fabric: Fabric, model: Any) -> dict[str, Any]:
    """The full weights, on every rank."""
    state = fabric.strategy.get_module_state_dict(inner(model))
    kept = {name: _full(value.detach()).clone() for name, value in state.items()}
    result: dict[str, Any] = fabric.broadcast(kept)
    return result


def _full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def inner(model: Any) -> Any:
    """What the strategy made of it."""
    from fabric_core.wrappers.unwrap import unwrap

    return unwrap(model)


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(
        ((one[name].double() - other[name].double()).abs().max().item() for name in one if one[name].numel()),
        default=0.0,
    )


def stays(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs had the same weights and went on in the same way, bit by bit."""
    same = apart(one["weights"], other["weights"]) == 0 and apart(one["after"], other["after"]) == 0
    return same and one["losses"] == other["losses"]


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    """The type and text of the error that a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def saved_run(folder: str, stage: int, precision: str = "32-true", steps: int = 3, **options: Any) -> dict[str, Any]:
    """Train, save to ``folder``, train on. What there was at the save, and the losses after it."""
    fabric = launched(stage, precision, **options)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, steps)
    fabric.save(folder, {"model": model, "optimizer": optimizer, "step": steps})
    weights = whole(fabric, model)
    losses = train(fabric, model, optimizer, steps, steps + 3)
    after = whole(fabric, model)
    fabric.teardown()
    return {"weights": weights, "losses": losses, "after": after}


def loaded_run(
    folder: str, how: Any, precision: str = "32-true", names: Any = ("model", "optimizer", "step"), **options: Any
) -> dict[str, Any]:
    """Load what ``saved_run`` has saved into fresh objects under any strategy, and train on."""
    fabric = launched(how, precision, **options)
    model, optimizer = set_up(fabric, seed=5)
    objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    state = {name: objects[name] for name in names}
    rest = fabric.load(folder, state)
    weights = whole(fabric, model)
    losses = train(fabric, model, optimizer, 3, 6)
    after = whole(fabric, model)
    fabric.teardown()
    return {"weights": weights, "losses": losses, "after": after, "rest": rest, "step": state.get("step")}


def saved_once(workers: Any, folders: Any) -> Any:
    """A function of stage and precision: the folder that two ranks saved, and what they did then; each made once."""
    made: dict[Any, Any] = {}

    def get(stage: int, precision: str = "32-true") -> tuple[str, dict[str, Any]]:
        if (stage, precision) not in made:
            folder = str(folders.mktemp("run") / "ck")
            made[stage, precision] = folder, run(workers(2), saved_run, folder, stage, precision)[0]
        return made[stage, precision]  # type: ignore[no-any-return]

    return get
