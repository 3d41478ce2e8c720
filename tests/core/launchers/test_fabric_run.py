"""``fabric run``: what the workers find, and what happens when something ends early."""

import gzip
import json
import os
import re
import signal
import time

import pytest

SHOW = """
    import json, os, sys
    names = sys.argv[1].split(",")
    rank = os.environ["RANK"]
    with open(f"seen-{rank}", "w") as file:
        json.dump({name: os.environ.get(name) for name in names}, file)
"""
IDLE = """
    import os, signal, sys, time
    for name in sys.argv[1:]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    open(f"pid-{os.getpid()}", "w").close()
    while True:
        time.sleep(0.1)
"""


def seen(programs, rank):
    return json.loads((programs.folder / f"seen-{rank}").read_text())


def test_workers_find_what_torchrun_would_tell_them(programs):
    names = "RANK,LOCAL_RANK,WORLD_SIZE,LOCAL_WORLD_SIZE,GROUP_RANK,NODE_RANK,MASTER_ADDR,TORCHELASTIC_RESTART_COUNT"
    assert programs.fabric_run("--devices", 2, programs.write(SHOW), names).code == 0
    assert list(seen(programs, 1).values()) == ["1", "1", "2", "2", "0", "0", "127.0.0.1", "0"]


def test_only_what_was_typed_is_exported(programs):
    names = "LT_CLI_USED,LT_DEVICES,LT_STRATEGY,LT_NUM_NODES,LT_PRECISION,LT_ACCELERATOR"
    words = ["--strategy=ddp", "--devices", "1", programs.write(SHOW), names, "--precision", "bf16"]
    assert programs.fabric_run(*words).code == 0
    assert list(seen(programs, 0).values()) == ["1", "1", "ddp", None, "bf16", None]


def test_without_devices_the_script_itself_decides_how_many(programs):
    script = programs.write(
        """
        import os, sys, torch
        from fabric_core import Fabric
        fabric = Fabric(accelerator="cpu", devices=2)
        total = fabric.all_reduce(torch.ones(1), reduce_op="sum").item()
        print(f"{fabric.world_size} {total} {os.environ['LT_PRECISION']} {sys.argv[1:]}\\n", end="", flush=True)
        """
    )
    ended = programs.fabric_run("--precision", "bf16-mixed", script, "--lr", "1")
    assert (ended.code, ended.out) == (0, "2 2.0 bf16-mixed ['--lr', '1']\n" * 2), ended.err


def test_the_second_node_has_the_later_ranks(programs):
    options = ["--num_nodes", 2, "--node_rank=1", "--main_address", "10.0.0.7", "--main_port", 1234, "--devices", "0,1"]
    assert programs.fabric_run(*options, programs.write(SHOW), "RANK,WORLD_SIZE,MASTER_ADDR,MASTER_PORT").code == 0
    assert list(seen(programs, 3).values()) == ["3", "4", "10.0.0.7", "1234"]


def test_a_script_runs_as_if_python_had_started_it(programs):
    script = programs.write(
        """
        import pickle, sys, multiprocessing
        class Thing: pass
        def double(x): return 2 * x
        if __name__ == "__main__":
            assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [21]), sys.argv[1:], sys.path[0] == __file__.rpartition("/")[0])
        """
    )
    ended = programs.fabric_run(script, "--lr", "1", "--help", "-m", "x")
    assert (ended.code, ended.out) == (0, "[42] ['--lr', '1', '--help', '-m', 'x'] True\n"), ended.err


@pytest.mark.parametrize("option", ["-m", "--module"])
def test_a_module_runs_as_with_python_m(programs, option):
    (programs.folder / "package").mkdir()
    programs.write("import sys; print(__name__, __spec__.name, sys.argv[1:])", "package/__main__.py")
    ended = programs.fabric_run(option, "package", "a", "--b")
    assert ended.out == "__main__ package.__main__ ['a', '--b']\n", ended.err


def test_exit_functions_and_threads_finish_before_a_worker_ends(programs):
    script = programs.write(
        """
        import atexit, threading, time
        atexit.register(print, "last")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
        print("end")
        """
    )
    assert programs.fabric_run("--devices", 1, script).out == "end\nthread\nlast\n"


@pytest.mark.parametrize(
    ("statement", "code", "text"),
    [
        ("raise ValueError('one')", 1, "ValueError: one"),
        ("sys.exit(3)", 3, "sys.exit(3)"),
        ("sys.exit('no data')", 1, "SystemExit: no data"),
        ("os.kill(os.getpid(), 9)", 137, "ended by SIGKILL"),
        ("os.abort()", 134, "ended by SIGABRT"),
    ],
)
def test_the_first_failure_ends_the_job_and_gives_its_exit_code(programs, statement, code, text):
    script = programs.write(
        f"""
        import os, pathlib, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
            pathlib.Path("failed").write_text(str(time.time()))
            {statement}
        time.sleep(60)
        """
    )
    ended = programs.fabric_run("--devices", 2, script)
    assert programs.seconds_since("failed") < 10
    assert ended.code == code
    assert ended.err.count(text) == 1
    assert re.search(rf"Rank 1 on \S+ failed first, exit code {code}:", ended.err)


def test_the_consequences_of_a_failure_take_one_line(programs):
    script = programs.write(
        """
        import os, time
        if os.environ["RANK"] == "1":
            raise ValueError("the cause")
        raise RuntimeError("[pair.cc:553] Connection closed by peer")
        """
    )
    ended = programs.fabric_run("--devices", 4, script)
    assert ended.err.count("Traceback") == 1
    assert "ValueError: the cause\nAfterwards rank 0, 2, 3 failed too: RuntimeError: [pair.cc" in ended.err


def test_a_crash_in_native_code_shows_the_python_lines(programs):
    script = programs.write("import ctypes\ndef poke():\n    ctypes.string_at(0)\npoke()")
    ended = programs.fabric_run("--devices", 1, script)
    assert ended.code == 139
    assert "line 3 in poke" in ended.err


def test_no_worker_outlives_a_killed_launcher(programs, gone):
    job = programs.start("-m", "fabric_core", "run", "--devices", 2, programs.write(IDLE))
    pids = programs.wait_for_pids(2)
    job.kill()
    assert gone(pids, 10)


def test_ctrl_c_ends_workers_that_ignore_it(programs, gone):
    job = programs.start("-m", "fabric_core", "run", "--devices", 2, programs.write(IDLE), "SIGINT")
    pids = programs.wait_for_pids(2)
    job.send_signal(signal.SIGINT)
    job.send_signal(signal.SIGINT)
    assert programs.end(job).code == 130
    assert gone(pids, 0)


def test_ctrl_c_lets_workers_save_their_work(programs):
    script = programs.write(
        """
        import os, time
        try:
            open(f"pid-{os.getpid()}", "w").close()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3)
            print("saved")
        """
    )
    job = programs.start("-m", "fabric_core", "run", "--devices", 2, script)
    programs.wait_for_pids(2)
    job.send_signal(signal.SIGINT)
    ended = programs.end(job)
    assert (ended.code, ended.out, ended.err) == (130, "saved\nsaved\n", "")


def test_a_termination_signal_is_passed_on(programs):
    script = programs.write(
        """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
        open(f"pid-{os.getpid()}", "w").close()
        time.sleep(60)
        """
    )
    job = programs.start("-m", "fabric_core", "run", "--devices", 2, script)
    programs.wait_for_pids(2)
    job.terminate()
    ended = programs.end(job)
    assert (ended.code, ended.out) == (143, "saved\nsaved\n")


def test_runs_at_the_same_time_have_ports_of_their_own(programs):
    script = programs.write("import os, time; print(os.environ['MASTER_PORT']); time.sleep(0.3)")
    jobs = [programs.start("-m", "fabric_core", "run", "--devices", 1, script) for _ in range(4)]
    assert len({programs.end(job).out for job in jobs}) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strategy", "nope", "program.py"], "Installed: single_device, ddp"),
        (["--accelerator", "nope", "program.py"], "Installed: cpu"),
        (["--precision", "7-bit", "program.py"], "32-true"),
        (["--devices", "two", "program.py"], 'expected a count "2"'),
        (["--devices", "0", "program.py"], "ask for at least one"),
        (["--node-rank", "1", "program.py"], "nodes count from 0 to 0"),
        (["absent.py"], "There is no script 'absent.py'"),
        ([], "Name the script to run"),
        (["--lr", "program.py"], "No such option"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(programs, words, expected):
    programs.write("")
    ended = programs.fabric_run(*words)
    assert ended.code == 2
    assert expected in " ".join(ended.err.split())


def test_the_launcher_imports_no_torch(programs):
    command = (
        "import sys; from fabric_core.cli.run import run; run(['--devices', '1', 'program.py'], standalone_mode=False)"
    )
    programs.write("import sys; assert 'torch' not in sys.modules")
    ended = programs.run("-c", f"{command}; print('torch' in sys.modules)")
    assert (ended.code, ended.out) == (0, "False\n"), ended.err


def test_two_processes_reduce_over_gloo(programs):
    script = programs.write(
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([dist.get_rank() + 1])
        dist.all_reduce(total)
        assert total.item() == 3
        """
    )
    ended = programs.fabric_run("--devices", 2, script)
    assert (ended.code, ended.err) == (0, "")


def test_nothing_is_left_in_the_folder_for_temporary_files(programs, monkeypatch):
    folder = programs.folder / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    assert programs.fabric_run("--devices", 1, programs.write("raise ValueError")).code == 1
    assert os.listdir(folder) == []


def test_a_failure_is_shown_even_if_an_exit_function_hangs(programs):
    script = programs.write("import atexit, time; atexit.register(time.sleep, 60); raise ValueError('first')")
    started = time.monotonic()
    ended = programs.fabric_run("--devices", 1, script)
    assert ended.code == 1
    assert ended.err.endswith("ValueError: first\n")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError"])
def test_files_that_nobody_closed_are_complete(programs, end):
    script = programs.write(
        f"""
        import gzip, sys
        log = open("log", "w")
        log.write("x" * 100)
        raw = open("raw", "wb")
        raw.write(b"x" * 100)
        packed = gzip.open("packed", "wt")
        packed.write("x" * 100)
        {end}
        """
    )
    programs.fabric_run("--devices", 1, script)
    assert (programs.folder / "log").read_text() == "x" * 100
    assert (programs.folder / "raw").read_text() == "x" * 100
    assert gzip.decompress((programs.folder / "packed").read_bytes()) == b"x" * 100
