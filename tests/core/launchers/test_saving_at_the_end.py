"""A save in the background when its process ends, in every way that a process can end by itself."""

import signal
import time

import pytest
import torch

SLOW = """
import atexit, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from fabric_core import Fabric
from fabric_core.checkpoint.async_io import AsyncCheckpointIO
from fabric_core.checkpoint.torch_io import TorchCheckpointIO

class Slow(TorchCheckpointIO):
    # Takes a second, and needs a thread pool, as writers to object stores do.
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path("begun").touch()
        time.sleep(1)
        if checkpoint["step"] < 0:
            raise OSError(28, "No space left on device", str(path))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(super().save_checkpoint, checkpoint, path).result()
"""
SAVE = 'fabric.save("a.ckpt", {"step": STEP, "w": torch.full((1000,), 1.0)})'
ALONE = SLOW + 'fabric = Fabric(accelerator="cpu", devices=1, checkpoint_io=AsyncCheckpointIO(Slow()))\n'
# Every rank has a part in the writing, as in a sharded checkpoint: none can finish without the other.
TOGETHER = (
    SLOW
    + """
import torch.distributed as dist
from fabric_core.checkpoint.async_io import background_group

def main(fabric):
    group, io = background_group(), fabric.strategy.checkpoint_io
    assert group is background_group()
    part = io.stage(torch.tensor(1.0))

    def write():
        time.sleep(1)
        dist.all_reduce(part, group=group)
        if fabric.global_rank == 0:
            torch.save(part, "a.ckpt")

    io.submit(write, "a.ckpt")
    END

def new():
    return Fabric(accelerator="cpu", devices=2, strategy=STRATEGY, checkpoint_io="async")
"""
)
LAUNCH = {
    "python": ("'ddp'", "fabric = new()\nfabric.launch()\nmain(fabric)", "run"),
    "fabric run": ("'ddp'", "fabric = new()\nfabric.launch()\nmain(fabric)", "fabric_run"),
    "ddp_spawn": ("'ddp_spawn'", "if __name__ == '__main__':\n    new().launch(main)", "run"),
    "ddp_fork": ("'ddp_fork'", "if __name__ == '__main__':\n    new().launch(main)", "run"),
}
ENDS = {
    "its end": ("pass", 0, ""),
    "sys.exit": ("sys.exit(0)", 0, ""),
    "an exit code": ("sys.exit(5)", 5, ""),
    "an exception": ("raise ValueError('mine')", 1, "ValueError: mine"),
}


slow = pytest.mark.slow  # the same as another one, by another way


def saved(programs):
    return torch.load(programs.folder / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_after_its_save(end, programs):
    statement, code, words = ENDS[end]
    ended = programs.run(programs.write(f"{ALONE}{SAVE.replace('STEP', '3')}\n{statement}"))
    assert ended.code == code, ended.err
    assert ended.err.strip().endswith(words)
    assert saved(programs)["step"] == 3


def test_ctrl_c_leaves_time_to_finish_the_save(programs):
    job = programs.start(programs.write(f"{ALONE}{SAVE.replace('STEP', '3')}\ntime.sleep(60)"))
    while not (programs.folder / "begun").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    assert programs.end(job).code == -signal.SIGINT
    assert saved(programs)["step"] == 3


@pytest.mark.parametrize(("statement", "code"), [("pass", 1), ("raise ValueError", 1)])
def test_a_failure_at_the_end_is_printed_and_changes_the_exit_code(statement, code, programs):
    exits = "import logging\natexit.register(print, 'first')\n"
    script = f"{exits}{ALONE}atexit.register(print, 'second')\n{SAVE.replace('STEP', '-1')}\n{statement}"
    ended = programs.run(programs.write(f"import atexit\n{script}"))
    assert (ended.code, ended.out) == (code, "second\nfirst\n")
    assert "Writing the checkpoint 'a.ckpt' in the background failed:\n" in ended.err
    assert "No space left on device" in ended.err


def test_a_save_from_an_exit_function_is_written_at_once(programs):
    save = SAVE.replace("STEP", "2")
    ended = programs.run(
        programs.write(f"{ALONE}@atexit.register\ndef last():\n    {save}\n{SAVE.replace('STEP', '1')}")
    )
    # Python starts no pools at that point, and says so where the program can see it.
    assert "cannot schedule new futures" in ended.err
    plain = ALONE.replace("AsyncCheckpointIO(Slow())", "AsyncCheckpointIO()")
    ended = programs.run(programs.write(f"{plain}@atexit.register\ndef last():\n    {save}\n"))
    assert (ended.code, ended.err) == (0, "")
    assert saved(programs)["step"] == 2


@pytest.mark.parametrize(
    ("way", "end"),
    [
        ("fabric run", "an exception"),
        ("ddp_fork", "an exception"),
        ("python", "its end"),
        pytest.param("python", "an exception", marks=slow),
        pytest.param("ddp_spawn", "an exception", marks=slow),
        pytest.param("ddp_fork", "its end", marks=slow),
    ],
)
def test_a_job_ends_after_the_save_that_all_its_ranks_take_part_in(way, end, programs):
    statement, code, words = ENDS[end]
    strategy, start, run = LAUNCH[way]
    text = TOGETHER.replace("END", statement).replace("STRATEGY", strategy)
    ended = getattr(programs, run)(*(["--devices", "2"] if run == "fabric_run" else []), programs.write(text + start))
    assert ended.code == code, ended.err
    assert words in ended.err
    assert saved(programs).item() == 2


@pytest.mark.parametrize(
    ("way", "rank"),
    [
        ("python", 0),
        ("fabric run", 1),
        pytest.param("python", 1, marks=slow),
        pytest.param("ddp_fork", 0, marks=slow),
    ],
)
def test_a_job_ends_after_rank_zeros_save_whoever_fails(way, rank, programs):
    strategy, start, run = LAUNCH[way]
    body = (
        f"{SLOW}def main(fabric):\n    {SAVE.replace('STEP', '3')}\n    if fabric.global_rank == {rank}:\n"
        "        raise ValueError('mine')\n    while True:\n        fabric.barrier()\n"
        "def new():\n    io = AsyncCheckpointIO(Slow())\n"
        f"    return Fabric(accelerator='cpu', devices=2, strategy={strategy}, checkpoint_io=io)\n"
    )
    ended = getattr(programs, run)(*(["--devices", "2"] if run == "fabric_run" else []), programs.write(body + start))
    assert ended.code == 1
    assert "ValueError: mine" in ended.err
    assert saved(programs)["step"] == 3


@pytest.mark.parametrize("way", [pytest.param("python", marks=slow), "fabric run", "ddp_fork"])
def test_a_failure_at_the_end_of_a_job_is_the_jobs_failure(way, programs):
    strategy, start, run = LAUNCH[way]
    body = (
        f"{SLOW}def main(fabric):\n    {SAVE.replace('STEP', '-1')}\ndef new():\n    io = AsyncCheckpointIO(Slow())\n"
        f"    return Fabric(accelerator='cpu', devices=2, strategy={strategy}, checkpoint_io=io)\n"
    )
    ended = getattr(programs, run)(*(["--devices", "2"] if run == "fabric_run" else []), programs.write(body + start))
    assert ended.code == 1
    assert "No space left on device" in ended.err


def test_a_rank_that_is_killed_does_not_keep_the_others_waiting_for_its_part(programs):
    text = TOGETHER.replace("END", "os.kill(os.getpid(), 9) if fabric.global_rank else time.sleep(60)")
    start = time.monotonic()
    ended = programs.fabric_run(
        "--devices", "2", programs.write(text.replace("STRATEGY", "'ddp'") + LAUNCH["fabric run"][1])
    )
    assert ended.code == 137
    assert time.monotonic() - start < 30
    assert not (programs.folder / "a.ckpt").exists()


def test_the_group_of_the_background_goes_and_comes_with_the_main_one(programs):
    script = programs.write(
        """
        import torch.distributed as dist
        from fabric_core.checkpoint.async_io import background_group
        from fabric_core.distributed.exit import protect_exit
        protect_exit()
        def join():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        join()
        first = background_group()
        assert first is background_group() is not dist.group.WORLD
        for held in (first, None):  # also if somebody still holds the old one
            first = held
            dist.destroy_process_group()
            assert background_group() is None
            join()
            second = background_group()
            assert second is not None and second is not first
            dist.barrier(second)
            del second
        """
    )
    assert programs.run(script).code == 0
