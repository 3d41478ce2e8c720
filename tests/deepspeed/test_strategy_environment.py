"""What the strategy does to its process, and that nothing of it is left after teardown."""

import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from deepspeed_network import SPLIT, apart, batches, launched, message, network, whole

from fabric_core import Fabric, settings
from fabric_core.strategies import DeepSpeedStrategy as ByCore
from fabric_deepspeed import DeepSpeedStrategy

VARIABLES = [settings.MASTER_ADDR, settings.MASTER_PORT, settings.RANK, settings.LOCAL_RANK, settings.WORLD_SIZE]


def test_core_knows_where_the_class_is():
    assert ByCore is DeepSpeedStrategy


def step(fabric, steps=2):
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.01))
    for x, y in batches(steps, fabric.global_rank, fabric.world_size):
        fabric.backward((model(x) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return module


def on_its_own():
    """One process that nobody has told anything: the variables during the job and afterwards."""
    for setting in (*VARIABLES, settings.TORCHELASTIC_RUN_ID):
        setting.unset()
    fabric = Fabric(accelerator="cpu", devices=1, strategy="deepspeed_stage_2")
    fabric.launch()
    during = {setting.name: setting.text() for setting in VARIABLES}
    step(fabric)
    fabric.teardown()
    return during, [setting.is_set() for setting in VARIABLES]


def test_variables_that_deepspeed_reads_are_set_for_the_length_of_the_job(workers):
    [(during, afterwards)] = workers(1).run(on_its_own)
    assert (during["RANK"], during["LOCAL_RANK"], during["WORLD_SIZE"]) == ("0", "0", "1")
    assert during["MASTER_ADDR"]
    assert int(during["MASTER_PORT"]) > 0
    assert afterwards == [False] * 5


def told():
    fabric = launched(1)
    before = [setting.text() for setting in VARIABLES]
    fabric.teardown()
    return before == [setting.text() for setting in VARIABLES]


def test_variables_that_a_launcher_has_set_stay(workers):
    assert workers(2).run(told) == [True, True]


def state():
    """What DeepSpeed keeps for the whole process, as values that can be compared."""
    from deepspeed.comm import comm
    from deepspeed.runtime.activation_checkpointing import checkpointing
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups, nvtx

    logger = logging.getLogger("DeepSpeed")
    return {
        "communication": comm.cdb,
        "groups": (groups._WORLD_GROUP, groups._DATA_PARALLEL_GROUP, dict(groups._EXPERT_PARALLEL_GROUP)),
        "activations": (checkpointing.PARTITION_ACTIVATIONS, checkpointing.deepspeed_checkpointing_enabled),
        "stage 3": (
            list(parameter_offload.FWD_MODULE_STACK),
            Init.num_persisted_elements,
            Init.apply_param_persistence,
        ),
        "ranges": nvtx.enable_nvtx,
        "linear": torch.nn.functional.linear,
        "log": (logger.level, [handler.level for handler in logger.handlers], list(logger.filters)),
    }


def jobs():
    """Jobs of all kinds in one process; what differs before and after each, and the parameters they end with."""
    from fabric_deepspeed.backend import load

    load("cpu")
    before, left, ends = state(), [], []
    for options in (
        {"stage": 3, "config": SPLIT, "partition_activations": True, "logging_level": logging.ERROR},
        {"stage": 1},
        {"stage": 2},
        {"config": {"zero_optimization": {"stage": 0}}},
        "ddp",
        {"stage": 3},
    ):
        fabric = launched(options if options == "ddp" else DeepSpeedStrategy(**options))
        module = step(fabric)
        ends.append(whole(module))
        fabric.teardown()
        left.append([name for name, value in state().items() if value != before[name]])
    return left, max(apart(end, ends[0]) for end in ends)


def test_each_job_leaves_the_process_as_it_was(workers):
    for left, difference in workers(2).run(jobs):
        assert left == [[]] * 6
        assert difference <= 3e-6


def two_at_once():
    """The first one ends while the other goes on."""
    first, second = launched(2), launched(3)
    step(first)
    first.teardown()
    end = whole(step(second))
    second.teardown()
    return end


def test_one_of_two_jobs_in_a_process_may_end_first(workers):
    alone, _ = workers(2).run(one_job)
    for end in workers(2).run(two_at_once):
        assert apart(end, alone) <= 1e-6


def one_job():
    fabric = launched(3)
    end = whole(step(fabric))
    fabric.teardown()
    return end


def printed(level):
    """What DeepSpeed's log shows of a job."""
    logger = logging.getLogger("DeepSpeed")
    shown = []
    strategy = DeepSpeedStrategy(stage=2, logging_level=level)
    fabric = launched(strategy)
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.levelno)
    logger.addHandler(handler)
    step(fabric)
    logger.removeHandler(handler)
    fabric.teardown()
    return shown


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_the_log_has_the_level_that_was_asked_for(level, workers):
    shown = workers(2).run(printed, level)[0]
    assert min(shown, default=level) >= level
    assert level != logging.INFO or logging.INFO in shown


def checkpointed(asked):
    from deepspeed import checkpointing

    options = {"partition_activations": True, "cpu_checkpointing": True} if asked else {}
    fabric = launched(DeepSpeedStrategy(stage=2, **options))
    found = checkpointing.is_configured(), checkpointing.PARTITION_ACTIVATIONS, checkpointing.CPU_CHECKPOINT
    fabric.teardown()
    return found


@pytest.mark.parametrize("asked", [True, False])
def test_activation_checkpointing_is_configured_when_it_is_asked_for(asked, workers):
    assert workers(2).run(checkpointed, asked) == [(asked, asked, asked)] * 2


def properties():
    strategy = DeepSpeedStrategy(stage=3)
    texts = [message(lambda: strategy.deepspeed)]
    before = strategy.zero_stage_3, strategy.model, strategy.engines, "bf16" in strategy.config
    fabric = launched(strategy, precision="bf16-true")
    module = network()
    model, _ = fabric.setup(module, torch.optim.Adam(module.parameters()))
    during = strategy.model is model._forward_module, len(strategy.engines), strategy.config["bf16"]["enabled"]
    texts.append(message(lambda: Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(stage=7))))
    fabric.teardown()
    return before, during, (strategy.model, strategy.engines, "bf16" in strategy.config), texts


def test_properties_before_during_and_after_a_job(workers):
    for before, during, after, texts in workers(2).run(properties):
        assert before == (True, None, [], False)
        assert during == (True, 1, True)
        assert after == (None, [], False)
        assert "fabric.launch()" in texts[0]
        assert "stage" in texts[1]


def again():
    """One strategy object for two jobs of different precision."""
    strategy = DeepSpeedStrategy(stage=2)
    dtypes = []
    for precision in ("bf16-true", "32-true"):
        fabric = launched(strategy, precision=precision)
        dtypes.append(str(step(fabric)[0].weight.dtype))
        fabric.teardown()
    return dtypes


def test_a_strategy_can_be_used_again(workers):
    assert workers(2).run(again) == [["torch.bfloat16", "torch.float32"]] * 2


def test_a_strategy_can_be_sent_to_another_process():
    copy = pickle.loads(pickle.dumps(DeepSpeedStrategy(stage=3, logging_level=logging.ERROR)))
    assert copy.zero_stage_3
    assert copy.logging_level == logging.ERROR
    assert copy.engines == []


ON_A_DEVICE = """
import torch
from fabric_core import Fabric
fabric = Fabric(accelerator="cuda", devices=1, strategy="deepspeed_stage_{stage}", precision="bf16-true")
fabric.launch()
with fabric.init_module():
    module = torch.nn.Linear(4, 1)
model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.1))
losses = []
for _ in range(3):
    loss = model(torch.ones(2, 4, device=fabric.device)).square().mean()
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
fabric.teardown()
assert losses[2] < losses[0], losses
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_trains_on_a_device(stage):
    subprocess.run([sys.executable, "-c", ON_A_DEVICE.replace("{stage}", str(stage))], check=True, timeout=170)


def threads_over_time(stage):
    """How many threads this process has after one Fabric, and after three more."""
    counts = []
    for fabrics in (1, 3):
        for _ in range(fabrics):
            fabric = launched(stage)
            module = network()
            fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
            fabric.teardown()
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("stage", [1, 3])
def test_fabrics_over_one_group_share_its_copy(stage, workers):
    for first, last in workers(2).run(threads_over_time, stage):
        assert last == first
