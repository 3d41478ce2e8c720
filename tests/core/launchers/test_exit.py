"""The end of a process that joined a group."""

import pytest

PROGRAM = """
    import atexit, os, sys, torch, torch.distributed as dist
    from fabric_core.distributed.exit import protect_exit
    dist.init_process_group("gloo")
    protect_exit(); protect_exit()
    atexit.register(lambda: sys.stdout.write(f"joined: {dist.is_initialized()}\\n"))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    END
"""


@pytest.mark.parametrize(("statement", "code"), [("pass", 0), ("sys.exit(5)", 5), ("raise ValueError", 1)])
def test_a_plain_program_keeps_its_exit_code(programs, monkeypatch, statement, code):
    alone = "import os; os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')"
    ended = programs.run(programs.write(f"    {alone}{PROGRAM.replace('END', statement)}"))
    assert (ended.code, ended.out) == (code, "joined: True\n"), ended.err


def test_end_process_flushes_and_ends_at_once(programs):
    script = programs.write(
        """
        import atexit, threading, time
        from fabric_core.distributed.exit import end_process
        atexit.register(print, "not reached")
        threading.Thread(target=time.sleep, args=(60,)).start()
        print("before", end="")
        end_process(9)
        """
    )
    ended = programs.run(script)
    assert (ended.code, ended.out) == (9, "before")


def test_an_exit_under_torchrun_is_clean(programs):
    ended = programs.run(
        "-W", "default", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        programs.write(PROGRAM.replace("END", "pass")),
    )  # fmt: skip
    assert (ended.code, sorted(ended.out.splitlines())) == (0, ["joined: True"] * 2), ended.err
