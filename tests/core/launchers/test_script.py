"""The script launcher: ``python train.py`` becomes local rank 0 and starts the others."""

import signal

import pytest

LAUNCH = """
import os, sys, time
from pathlib import Path
from fabric_core.environments.default import LightningEnvironment
from fabric_core.launchers import ScriptLauncher
def launch(count=2, function=lambda: None):
    launcher = ScriptLauncher(LightningEnvironment(), count, 1)
    result = launcher.launch(function)
    return int(os.environ["RANK"]), launcher, result
"""
JOIN = """
import torch, torch.distributed as dist
def join():
    dist.init_process_group("gloo")
    return dist.get_rank()
def reduce_forever():
    while True:
        dist.all_reduce(torch.ones(1000))
"""
FAIL = "Path('failed').write_text(str(time.time()))"


@pytest.fixture
def program(programs):
    """Write a program with ``launch`` and, if asked for, ``join`` at its top."""

    def write(text, *tops):
        return programs.write("".join([LAUNCH, *tops]) + text)

    return write


def test_the_script_runs_once_for_each_rank_with_its_arguments(programs, program):
    script = program("r, _, result = launch(3, lambda: 7)\nprint(r, os.environ['WORLD_SIZE'], sys.argv[1:], result)")
    ended = programs.run(script, "--lr", "1")
    assert sorted(ended.out.splitlines()) == [f"{rank} 3 ['--lr', '1'] 7" for rank in range(3)], ended.err
    assert (ended.code, ended.err) == (0, "")


def test_a_module_is_run_again_as_a_module(programs, program):
    program("launch()\nprint(__spec__.name, sys.argv[1:])")
    assert programs.run("-m", "program", "x").out == "program ['x']\n" * 2


def test_interpreter_options_reach_the_other_ranks(programs, program):
    script = program("launch()\nprint(sys.flags.optimize, sys.warnoptions)")
    assert programs.run("-O", "-W", "error::UserWarning", script).out.count("'error::UserWarning'") == 2


def test_a_second_launch_starts_nothing(programs, program):
    script = program("launch()\nlaunch()\nprint('here')")
    assert programs.run(script).out == "here\n" * 2


def test_processes_started_from_outside_are_left_alone(programs, program):
    script = program("os.environ.update(LOCAL_RANK='0', RANK='0')\nprint(launch()[1].pids)")
    assert programs.run(script).out == "[]\n"


def test_without_a_script_there_is_nothing_to_run_again(programs):
    ended = programs.run("-c", LAUNCH + "launch()")
    assert ended.code == 1
    assert "UsageError: There is no script that the other processes could run" in ended.err


def test_two_ranks_reduce_over_gloo_and_end_without_a_word(programs, program):
    script = program("launch(); join(); t = torch.ones(1); dist.all_reduce(t); assert t.item() == 2", JOIN)
    ended = programs.run(script)
    assert (ended.code, ended.err) == (0, "")


def test_rank_0_waits_for_the_others(programs, program):
    script = program("rank, *_ = launch()\ntime.sleep(0.5 * rank)\nprint('end', rank)")
    assert programs.run(script).out == "end 0\nend 1\n"


@pytest.mark.parametrize(
    ("statement", "code", "text"),
    [("raise ValueError('one')", 1, "ValueError: one"), ("sys.exit(3)", 3, "sys.exit(3)")],
)
def test_a_failed_worker_ends_rank_0_in_a_collective(programs, program, statement, code, text):
    script = program(f"launch()\nif join() == 1:\n    {FAIL}; {statement}\nreduce_forever()", JOIN)
    ended = programs.run(script)
    assert programs.seconds_since("failed") < 10
    assert ended.code == code
    assert ended.err.count(text) == 1
    assert ended.err.count("Traceback") <= 1


def test_a_killed_worker_ends_rank_0_that_works_alone(programs, program):
    script = program(f"rank, *_ = launch()\nif rank == 1:\n    {FAIL}; os.kill(os.getpid(), 9)\ntime.sleep(60)")
    ended = programs.run(script)
    assert programs.seconds_since("failed") < 10
    assert ended.code == 137
    assert "Rank 1 on" in ended.err
    assert "ended by SIGKILL" in ended.err


def test_a_failure_of_rank_0_ends_the_others_and_is_shown_once(programs, program):
    script = program(f"rank, *_ = launch()\nif rank == 0:\n    {FAIL}; raise ValueError('zero')\ntime.sleep(60)")
    ended = programs.run(script)
    assert programs.seconds_since("failed") < 10
    assert ended.code == 1
    assert ended.err.startswith("Rank 0 on")
    assert ended.err.count("ValueError: zero") == 1


def test_a_failure_after_rank_0_has_ended_is_not_lost(programs, program):
    script = program("rank, *_ = launch()\nif rank == 1:\n    time.sleep(0.3)\n    raise ValueError('late')")
    ended = programs.run(script)
    assert ended.code == 1
    assert "ValueError: late" in ended.err


def test_rank_0_that_leaves_early_does_not_keep_others_waiting(programs, program):
    script = program("launch()\nif join() == 1:\n    reduce_forever()", JOIN)
    ended = programs.run(script)
    assert ended.code == 1
    assert ended.err.startswith("Rank 1 on")


def test_no_worker_outlives_a_killed_rank_0(programs, program, gone):
    job = programs.start(program("launch(3)\nopen(f'pid-{os.getpid()}', 'w').close()\ntime.sleep(60)"))
    pids = programs.wait_for_pids(3)
    job.kill()
    job.wait()
    assert gone(pids, 10)


def test_ctrl_c_ends_all(programs, program, gone):
    job = programs.start(program("launch()\nopen(f'pid-{os.getpid()}', 'w').close()\ntime.sleep(60)"))
    pids = programs.wait_for_pids(2)
    job.send_signal(signal.SIGINT)
    ended = programs.end(job)
    assert ended.code == -signal.SIGINT
    assert ended.err.count("KeyboardInterrupt") == 1
    assert gone(pids, 0)


def test_the_exception_hook_is_put_back_when_the_workers_have_ended(programs, program):
    script = program(
        "before = sys.excepthook\nrank, *_ = launch()\nif rank == 0:\n    assert sys.excepthook != before\n"
        "    while sys.excepthook != before: time.sleep(0.01)\n    print('back')"
    )
    assert programs.run(script).out == "back\n"


def test_files_that_nobody_closed_are_complete(programs, program):
    assert programs.run(program("rank, *_ = launch()\nlog = open(f'log-{rank}', 'w')\nlog.write('x' * 100)")).code == 0
    assert [(programs.folder / f"log-{rank}").read_text() for rank in range(2)] == ["x" * 100] * 2


@pytest.mark.parametrize(("status", "code"), [("3", 3), ("'message'", 1)])
def test_rank_0_that_exits_while_others_wait_keeps_its_exit_code(programs, program, status, code):
    ended = programs.run(program(f"launch()\nif join() == 1:\n    reduce_forever()\nsys.exit({status})", JOIN))
    assert ended.code == code
    assert f"Rank 0 ended itself with exit code {code}. Afterwards rank 1 failed too:" in ended.err


def test_a_failure_of_its_own_counts_more_than_the_end_of_rank_0(programs, program):
    script = program("rank, *_ = launch()\nif rank == 1:\n    time.sleep(0.3)\n    sys.exit(5)\nsys.exit(0)")
    assert programs.run(script).code == 5
