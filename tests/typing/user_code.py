"""What a typical program writes. Only checked by mypy, never run; ``assert_type`` says what the checker must see."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

from fabric_core import Fabric, seed_everything
from fabric_core.abc import Logger, Precision
from fabric_core.checkpoint import TorchCheckpointIO
from fabric_core.precision import MixedPrecision
from fabric_core.strategies import DDPStrategy, SingleDeviceStrategy


class Note:
    def on_after_optimizer_step(self, strategy: Any, optimizer: torch.optim.Optimizer) -> None: ...


class Traced(SingleDeviceStrategy):
    def barrier(self, name: str | None = None) -> None:
        print("barrier", name)


class Program(Fabric):
    def run(self, epochs: int) -> float:
        return float(epochs)


def main(fabric: Fabric, epochs: int) -> float:
    with fabric.rank_zero_first():
        dataset = TensorDataset(torch.ones(4, 2))
    with fabric.init_module(empty_init=False):
        module = nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=1), use_distributed_sampler=False)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0}
    for step, (batch,) in enumerate(loader):
        with fabric.no_backward_sync(model, enabled=step % 2 == 0), fabric.autocast():
            loss: Tensor = model(batch).sum()
            fabric.backward(loss)
        assert_type(fabric.clip_gradients(model, optimizer, max_norm=1.0), Tensor | None)
        optimizer.step()
        fabric.log_dict({"loss": loss, "step": step}, step=step)
    fabric.save("model.ckpt", state, filter={"model": lambda name, value: "bias" not in name})
    assert_type(fabric.load("model.ckpt", state, strict=False), dict[str, Any])
    fabric.load_raw("weights.pt", model, weights_only=True)
    fabric.print("done", fabric.all_reduce(1.0, reduce_op="sum"), flush=True)
    fabric.barrier("end")
    return float(loss)


def members(fabric: Fabric) -> None:
    assert_type(fabric.device, torch.device)
    assert_type(fabric.global_rank, int)
    assert_type(fabric.world_size, int)
    assert_type(fabric.is_global_zero, bool)
    assert_type(fabric.logger, Logger)
    assert_type(fabric.plan.explain(), str)
    assert_type(Fabric.seed_everything(1), int)
    assert_type(seed_everything(1, workers=True), int)


Fabric()
Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="bf16-mixed")
Fabric(devices=[0, 1], num_nodes=2, precision=16, callbacks=[Note()], loggers=[])
Fabric(strategy=DDPStrategy(find_unused_parameters=True), plugins=[MixedPrecision("bf16-mixed"), TorchCheckpointIO()])
Fabric(strategy=SingleDeviceStrategy(device="cpu", precision=Precision()), devices="auto")
Fabric(accelerator="cpu").launch(main, 3)
Program(devices=1).run(3)
