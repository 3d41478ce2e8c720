"""The generic accelerator on a real device; skipped where torch reports none."""

import pytest
import torch

from fabric_core import Fabric
from fabric_core.accelerators import GenericAccelerator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GenericAccelerator.is_available(), reason="torch.accelerator reports no device"),
]


def train(precision, steps=20):
    fabric = Fabric(accelerator="generic", devices=1, precision=precision)
    fabric.seed_everything(1, verbose=False)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    x = fabric.to_device(torch.randn(64, 16))
    losses = []
    for _ in range(steps):
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_model_learns_on_the_device(precision):
    model, losses = train(precision)
    assert model.device.type == torch.accelerator.current_accelerator().type
    assert losses[-1] < 0.9 * losses[0]


def test_auto_prefers_the_device_to_the_cpu():
    assert Fabric(devices=1).device.type != "cpu"


def test_batches_arrive_on_the_device():
    fabric = Fabric(accelerator="generic", devices=1)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(torch.arange(8.0), batch_size=4))
    assert all(batch.device == fabric.device for batch in loader)


def test_random_states_of_the_device_can_be_restored():
    accelerator = GenericAccelerator()
    device = accelerator.get_parallel_devices([0])[0]
    state = accelerator.capture_rng()
    first = torch.rand(4, device=device)
    accelerator.restore_rng(state)
    assert torch.equal(first, torch.rand(4, device=device))
