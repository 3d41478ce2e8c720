"""Writes the checkpoints beside this file. Run it with Lightning 2.6.6 and torch 2.13: ``python make.py``.

One process and two, on the CPU. What Lightning refuses there by the name of the accelerator is let through; everything
that is written, Lightning and torch write.
"""

import os
import shutil
import sys
from pathlib import Path

import lightning.fabric.strategies.fsdp
import torch
import torch.multiprocessing
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

HERE = Path(__file__).resolve().parent


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, affine=False)), nn.Linear(6, 3))


def parallelize(module, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    if mesh["tensor_parallel"].size() > 1:
        return parallelize_module(module, mesh["tensor_parallel"], {"1": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(module[0], mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


class FSDPOnCPU(FSDPStrategy):
    def setup_module(self, module):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)


def whole_state_in_place(module, world_size, rank0_only=True):
    """Lightning's context without the copy to the CPU, on which torch 2.13 crashes if the state is there already."""
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.api import FullOptimStateDictConfig

    return FSDP.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=rank0_only),
        FullOptimStateDictConfig(rank0_only=rank0_only),
    )


STRATEGIES = {
    "single": lambda: "auto",
    "fsdp-sharded": lambda: FSDPOnCPU(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"),
    "fsdp-full": lambda: FSDPOnCPU(auto_wrap_policy={nn.Linear}, state_dict_type="full"),
    "model-parallel-fsdp-sharded": lambda: ModelParallelStrategy(parallelize, 2, 1),
    "model-parallel-fsdp-full": lambda: ModelParallelStrategy(parallelize, 2, 1, save_distributed_checkpoint=False),
    "model-parallel-tp-sharded": lambda: ModelParallelStrategy(parallelize, 1, 2),
    "model-parallel-tp-full": lambda: ModelParallelStrategy(parallelize, 1, 2, save_distributed_checkpoint=False),
}


def write(rank, name, folder):
    if name != "single":
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="29677",
            TORCHELASTIC_RUN_ID="make",
        )
    lightning.fabric.strategies.fsdp._get_full_state_dict_context = whole_state_in_place
    strategy = STRATEGIES[name]()
    fabric = Fabric(accelerator="cpu", devices=1 if name == "single" else 2, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(make_model())
    vectors = [p for n, p in model.named_parameters() if n.endswith("bias")]
    matrices = [p for n, p in model.named_parameters() if n.endswith("weight")]
    optimizer = torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 0.02}], lr=0.01)
    optimizer = fabric.setup_optimizers(optimizer)
    inputs = torch.arange(12.0).reshape(4, 3) / 10
    for _ in range(2):
        fabric.backward(model(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(folder / name, {"model": model, "optimizer": optimizer, "steps": 2, "note": {"by": "Lightning"}})
    model.eval()
    with torch.no_grad():
        outputs = model(inputs) + 0  # what a collective returns becomes a plain tensor
    if rank == 0:
        torch.save({"inputs": inputs, "outputs": outputs}, folder / f"{name}.probe")
    fabric.barrier()
    sys.stdout.flush()
    os._exit(0)


def put_right(folder):
    """Gathering on the CPU, torch 2.13 makes all of a parameter's states the last one: take the sharded ones."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    content, right = torch.load(folder / "fsdp-full"), _load_distributed_checkpoint(folder / "fsdp-sharded")
    for name, entries in content["optimizer"]["state"].items():
        for key in entries:
            entries[key] = right["optimizer"]["state"][name][key]
    torch.save(content, folder / "fsdp-full")


if __name__ == "__main__":
    for name in sys.argv[1:] or STRATEGIES:
        for old in (HERE / name, HERE / f"{name}.probe"):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        torch.multiprocessing.spawn(write, (name, HERE), 1 if name == "single" else 2)
        if name == "fsdp-full":
            put_right(HERE)
        print(name, "written")
