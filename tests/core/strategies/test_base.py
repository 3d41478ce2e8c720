"""What a strategy gets from the base class, and what the least of them must write itself."""

from datetime import timedelta

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.abc import Precision
from fabric_core.plugins import LightningEnvironment, TorchCheckpointIO
from fabric_core.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy


class Least(Strategy):
    """The seven members that the base class leaves."""

    root_device = torch.device("cpu")
    is_global_zero = True

    def module_to_device(self, module):
        module.to(self.root_device)

    def all_gather(self, tensor, group=None, sync_grads=False):
        return tensor

    def all_reduce(self, tensor, group=None, reduce_op="mean"):
        return tensor

    def barrier(self, name=None):
        pass

    def broadcast(self, obj, src=0):
        return obj


def test_seven_members_make_a_strategy(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, strategy=Least())
    module = nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(1, 2)).sum())
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
    assert fabric.load(tmp_path / "a.ckpt", {"model": model}).keys() == {"optimizer"}


def test_without_the_seven_there_is_no_strategy():
    with pytest.raises(TypeError, match="abstract"):
        Strategy()


def test_precision_and_checkpoints_have_working_defaults():
    strategy = Least()
    assert type(strategy.precision) is Precision
    assert strategy.precision is strategy.precision
    assert type(strategy.checkpoint_io) is TorchCheckpointIO
    assert strategy.checkpoint_io is strategy.checkpoint_io
    assert strategy.launcher is None


def test_what_was_given_is_kept():
    io, precision = TorchCheckpointIO(), Precision()
    strategy = Least(checkpoint_io=io, precision=precision)
    assert strategy.checkpoint_io is io
    assert strategy.precision is precision


def test_one_process_is_the_default():
    strategy = Least()
    assert (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size) == (0, 0, 0, 1)
    assert strategy.distributed_sampler_kwargs is None
    assert strategy.reduce_boolean_decision(False) is False
    assert strategy.reduce_boolean_decision(True, all=False) is True


def test_batches_move_to_the_device_or_to_another():
    strategy = Least()
    assert strategy.batch_to_device([torch.ones(1)], torch.device("meta"))[0].device.type == "meta"
    assert strategy.batch_to_device([torch.ones(1), "text"])[1] == "text"


def test_wrapping_changes_nothing_by_default():
    strategy, module = Least(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    assert strategy.setup_module_and_optimizers(module, [optimizer], "scheduler") == (module, [optimizer], "scheduler")


def test_a_step_passes_through_the_precision_only_if_it_has_to(fake_backend):
    from fabric_core.testing import FakePrecision

    assert (Least().changes_step, Least().changes_backward) == (False, False)
    strategy = Least(precision=FakePrecision())
    assert (strategy.changes_step, strategy.changes_backward) == (True, True)


def test_a_context_that_fails_leaves_the_others_closed():
    class Failing(Precision):
        def module_init_context(self):
            raise LookupError("no context")

    with pytest.raises(LookupError), Least(precision=Failing()).module_init_context():
        pass
    assert torch.ones(1).device.type == "cpu"


def test_single_device_takes_what_was_resolved_unless_told():
    from fabric_core.accelerators import CPUAccelerator

    devices = {"devices": [torch.device("meta")], "num_nodes": 1, "interactive": False}
    strategy = SingleDeviceStrategy(accelerator=CPUAccelerator())
    strategy.connect(environment=LightningEnvironment(), **devices)
    assert strategy.root_device == torch.device("meta")
    strategy = SingleDeviceStrategy("cpu")
    strategy.connect(environment=LightningEnvironment(), **devices)
    assert strategy.root_device == torch.device("cpu")


def test_single_device_has_nobody_to_talk_to():
    strategy, tensor = SingleDeviceStrategy(), torch.ones(2)
    assert strategy.all_gather(tensor) is tensor
    assert strategy.all_reduce(tensor, reduce_op="sum") is tensor
    assert strategy.broadcast("object", src=3) == "object"
    assert strategy.barrier("name") is None
    assert strategy.is_global_zero
    assert strategy.sync_free


def test_parallel_strategies_ask_the_environment_for_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    strategy = Fabric(accelerator="cpu", devices=2, num_nodes=3, strategy="ddp").strategy
    assert (strategy.local_rank, strategy.node_rank, strategy.global_rank, strategy.world_size) == (1, 2, 5, 6)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 6, "rank": 5}
    assert not strategy.is_global_zero


def test_parallel_strategies_without_an_environment_are_alone():
    strategy = DDPStrategy()
    assert (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size) == (0, 0, 0, 1)
    with pytest.raises(RuntimeError, match="no devices yet"):
        strategy.root_device  # noqa: B018
    with pytest.raises(RuntimeError, match=r"no cluster environment yet: Fabric\(\.\.\.\) detects it"):
        DDPStrategy(parallel_devices=[torch.device("cpu")]).setup_environment()


def test_collectives_before_the_group_change_nothing():
    strategy, tensor = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2), torch.ones(2)
    assert strategy.all_gather(tensor) is tensor
    assert strategy.all_reduce(tensor, reduce_op="sum") is tensor
    assert strategy.broadcast("object") == "object"
    strategy.barrier()


def test_the_backend_is_the_users_or_the_accelerators_or_torchs():
    devices = [torch.device("cpu")]
    assert DDPStrategy(parallel_devices=devices).process_group_backend == "gloo"
    assert DDPStrategy(parallel_devices=devices, process_group_backend="mpi").process_group_backend == "mpi"
    assert DDPStrategy(parallel_devices=[torch.device("meta")]).process_group_backend == "gloo"


def test_the_time_limit_is_torchs_unless_told():
    assert DDPStrategy().timeout == timedelta(minutes=30)
    assert DDPStrategy(timeout=None).timeout == timedelta(minutes=30)
    assert DDPStrategy(timeout=timedelta(seconds=5)).timeout == timedelta(seconds=5)


def test_arguments_for_torch_are_kept_apart():
    assert DDPStrategy(bucket_cap_mb=1, start_method="spawn").ddp_kwargs == {"bucket_cap_mb": 1}


def test_only_a_wrapped_module_can_skip_the_exchange():
    with pytest.raises(TypeError, match=r"fabric\.setup\(\) returned"):
        DDPStrategy().gradient_sync.no_backward_sync(nn.Linear(1, 1), enabled=True)


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("ddp", "ScriptLauncher"), ("ddp_spawn", "SpawnLauncher"), ("ddp_fork", "SpawnLauncher")],
)
def test_the_start_method_decides_the_launcher(name, launcher):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=name)
    assert type(fabric.strategy.launcher).__name__ == launcher


def test_processes_started_from_outside_need_no_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Fabric(accelerator="cpu", devices=2, strategy="ddp").strategy.launcher is None


def test_parallel_is_a_base_to_subclass():
    assert issubclass(DDPStrategy, ParallelStrategy)
    assert issubclass(ParallelStrategy, Strategy)


def test_a_precision_hook_may_look_without_returning():
    class Looking(Precision):
        def pre_backward(self, tensor, module):
            pass

    fabric = Fabric(accelerator="cpu", devices=1, plugins=Looking())
    model = fabric.setup(nn.Linear(1, 1))
    fabric.backward(model(torch.ones(1, 1)).sum())
    assert model.weight.grad is not None
