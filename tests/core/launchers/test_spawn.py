"""The spawn launcher: workers run a function, and the calling process gets rank 0's result."""

import re
import signal

import pytest

from fabric_core.environments.default import LightningEnvironment
from fabric_core.errors import InvalidArgumentError
from fabric_core.launchers import SpawnLauncher

TOP = """
import os, sys, time
from pathlib import Path
from fabric_core.environments.default import LightningEnvironment
from fabric_core.launchers import SpawnLauncher
def rank():
    return int(os.environ["RANK"])
def launch(function, *args, method=sys.argv[1], **kwargs):
    return SpawnLauncher(LightningEnvironment(), 2, 1, method).launch(function, *args, **kwargs)
"""
METHODS = pytest.mark.parametrize("method", ["spawn", "fork"])


@pytest.fixture
def run(programs):
    """Run a program whose main part is guarded, with the start method as its argument."""

    def run(method, functions, main):
        guarded = "".join(f"    {line}\n" for line in main.splitlines())
        path = programs.write(f'{TOP}\n{functions}\nif __name__ == "__main__":\n{guarded}')
        return programs.run(path, method)

    return run


@METHODS
def test_rank_0s_result_comes_back(run, method):
    ended = run(method, "def f(a, b): return rank(), os.environ['WORLD_SIZE'], a + b", "print(launch(f, 1, b=2))")
    assert (ended.out, ended.err) == ("(0, '2', 3)\n", "")


def test_a_forkserver_works_too(run):
    assert run("forkserver", "def f(): return rank()", "print(launch(f))").out == "0\n"


@METHODS
def test_tensors_come_back_after_their_worker_has_gone(run, method):
    ended = run(method, "import torch\ndef f(): return {'x': [torch.ones(3), 'y']}", "print(launch(f))")
    assert ended.out == "{'x': [tensor([1., 1., 1.]), 'y']}\n", ended.err


def test_workers_reduce_over_gloo(run):
    functions = """
import torch, torch.distributed as dist
def f():
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    return total
"""
    ended = run("spawn", functions, "print(launch(f))")
    assert (ended.code, ended.out, ended.err) == (0, "tensor([2.])\n", "")


def test_a_spawned_module_has_memory_of_its_own(run):
    functions = """
import torch
def f(parts):
    model = parts["model"]
    with torch.no_grad():
        model.weight.add_(1 + rank())
    time.sleep(0.5)
    return model.weight.is_shared(), model.weight[0, 0].item()
"""
    main = "model = torch.nn.Linear(2, 2)\ntorch.nn.init.zeros_(model.weight)\nprint(launch(f, {'model': model}))"
    assert run("spawn", functions, main).out == "(False, 1.0)\n"


def test_a_spawned_worker_computes_like_its_parent(run):
    functions = """
import random, torch
def f():
    return torch.are_deterministic_algorithms_enabled(), torch.rand(1).item(), random.random()
"""
    main = "torch.use_deterministic_algorithms(True)\ntorch.manual_seed(5)\nrandom.seed(5)\nprint(launch(f) == f())"
    ended = run("spawn", functions, main)
    assert ended.out == "True\n", ended.err


def test_a_spawned_worker_has_the_precision_settings_of_its_parent(run):
    functions = """
import torch
def f():
    return torch.get_default_dtype(), getattr(torch.backends.cuda.matmul, "fp32_precision", None)
"""
    main = 'torch.set_default_dtype(torch.float64)\ntorch.backends.cuda.matmul.fp32_precision = "tf32"'
    ended = run("spawn", functions, f"{main}\nprint(launch(f))")
    assert (ended.out, ended.err) == ("(torch.float64, 'tf32')\n", "")


@METHODS
@pytest.mark.parametrize(
    ("statement", "code", "text"),
    [
        ("raise ValueError('one')", 1, "ValueError: one"),
        ("sys.exit(3)", 3, "sys.exit(3)"),
        ("os.kill(os.getpid(), 9)", 137, "ended by SIGKILL"),
    ],
)
def test_the_first_failure_is_raised_and_gives_the_exit_code(run, programs, method, statement, code, text):
    functions = f"""
def f():
    if rank() == 1:
        Path("failed").write_text(str(time.time()))
        {statement}
    time.sleep(60)
"""
    ended = run(method, functions, "launch(f)")
    assert programs.seconds_since("failed") < 10
    assert ended.code == code
    assert re.search(rf"WorkerFailedError: Rank 1 on \S+ failed first, exit code {code}:", ended.err)
    assert ended.err.count(text) == 1


def test_a_failure_can_be_caught(run):
    main = "try:\n    launch(f)\nexcept Exception as e:\n    print(type(e).__name__, e.exit_code)\n"
    main += "print(sys.excepthook is sys.__excepthook__)"
    ended = run("fork", "def f(): sys.exit(4)", main)
    assert (ended.code, ended.out) == (0, "WorkerFailedError 4\nTrue\n")


def test_a_result_that_cannot_be_sent_is_named(run):
    ended = run("fork", "def f(): return lambda: 0", "launch(f)")
    assert "InvalidTypeError: The launched function returned a function that cannot be sent" in ended.err


def test_an_argument_that_cannot_be_unpacked_is_reported(run):
    functions = """
class Bad:
    def __reduce__(self): return (int, ("x",))
def f(bad): pass
"""
    ended = run("spawn", functions, "launch(f, Bad())")
    assert "WorkerFailedError: Rank" in ended.err
    assert "ValueError: invalid literal for int()" in ended.err


def test_a_missing_main_guard_is_explained_once(programs):
    ended = programs.run(programs.write(f"{TOP}\ndef f(): pass\nlaunch(f)"), "spawn")
    assert ended.code == 1
    assert ended.err.count('if __name__ == "__main__":') == 1
    assert ended.err.count("The program started processes while it was itself being loaded") == 1


@METHODS
def test_no_worker_outlives_a_killed_parent(programs, gone, method):
    body = "def f():\n    open(f'pid-{os.getpid()}', 'w').close()\n    time.sleep(60)\n"
    job = programs.start(programs.write(f'{TOP}\n{body}if __name__ == "__main__":\n    launch(f)'), method)
    pids = programs.wait_for_pids(2)
    job.kill()
    job.wait()
    assert gone(pids, 10)


def test_an_interrupted_notebook_cell_ends_its_workers(programs, gone):
    body = "def f():\n    open(f'pid-{os.getpid()}', 'w').close()\n    time.sleep(60)\n"
    main = "try:\n    launch(f)\nexcept KeyboardInterrupt:\n    print('interrupted')"
    job = programs.start(programs.write(f"{TOP}\n{body}{main}"), "fork")
    pids = programs.wait_for_pids(2)
    job.send_signal(signal.SIGINT)
    assert programs.end(job).out == "interrupted\n"
    assert gone(pids, 0)


def test_a_start_method_that_is_not_there_is_refused():
    with pytest.raises(InvalidArgumentError, match="start_method='telepathy' does not exist on this system"):
        SpawnLauncher(LightningEnvironment(), 2, 1, "telepathy")


def test_only_forked_workers_know_what_a_notebook_defines():
    launchers = {method: SpawnLauncher(LightningEnvironment(), 2, 1, method) for method in ("spawn", "fork")}
    assert [launchers[m].is_interactive_compatible for m in ("spawn", "fork")] == [False, True]


def test_a_process_that_can_no_longer_be_forked_is_asked_first():
    def check():
        raise RuntimeError("CUDA is initialised")

    with pytest.raises(RuntimeError, match="CUDA is initialised"):
        SpawnLauncher(LightningEnvironment(), 2, 1, "fork", check).launch(print)


@METHODS
def test_threads_and_open_files_of_a_worker_come_to_their_end(run, programs, method):
    functions = """
import threading
def late():
    time.sleep(0.5)
    Path(f"late-{rank()}").touch()
def f():
    global log
    log = open(f"log-{rank()}", "w")
    log.write("x" * 100)
    threading.Thread(target=late).start()
"""
    main = "own = open('own', 'w')\nown.write('once')\nlaunch(f)\nown.close()"
    ended = run(method, functions, main)
    assert (ended.code, ended.err) == (0, "")
    assert sorted(path.name for path in programs.folder.glob("late-*")) == ["late-0", "late-1"]
    assert [(programs.folder / f"log-{rank}").read_text() for rank in range(2)] == ["x" * 100] * 2
    assert (programs.folder / "own").read_text() == "once"


@METHODS
def test_ctrl_c_lets_workers_save_their_work(programs, gone, method):
    text = """
def f():
    try:
        open(f"pid-{os.getpid()}", "w").close()
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.6)
        Path(f"saved-{rank()}").touch()
        raise
if __name__ == "__main__":
    try:
        launch(f)
    except KeyboardInterrupt:
        print("interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    job = programs.start(programs.write(f"import signal\n{TOP}{text}"), method)
    pids = programs.wait_for_pids(2)
    job.send_signal(signal.SIGINT)
    ended = programs.end(job)
    assert (ended.code, ended.out) == (0, "interrupted\n"), ended.err
    assert len(list(programs.folder.glob("saved-*"))) == 2
    assert gone(pids, 0)
