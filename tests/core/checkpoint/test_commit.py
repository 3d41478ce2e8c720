"""A published file is there completely, or what was there before still is."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from fabric_core.checkpoint.commit import publish

both_ways = pytest.mark.parametrize("anonymous", [True, False], ids=["nameless", "named"])
posix = pytest.mark.skipif(os.name == "nt", reason="the file modes and limits of POSIX systems")


def write(path, data, **kwargs):
    with publish(path, **kwargs) as file:
        file.write(data)


def fail_halfway(path, anonymous):
    with publish(path, anonymous=anonymous) as file:
        file.write(b"half" * 100_000)
        raise KeyboardInterrupt


@both_ways
def test_parent_folders_are_made_and_nothing_else_stays(tmp_path, anonymous):
    write(tmp_path / "a" / "b" / "x", b"new", anonymous=anonymous)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x"]
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"new"


@both_ways
def test_an_error_in_the_block_leaves_the_old_file_and_no_other(tmp_path, anonymous):
    write(tmp_path / "x", b"old")
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(tmp_path / "x", anonymous)
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@both_ways
def test_readers_see_the_old_content_until_the_block_ends(tmp_path, anonymous):
    write(tmp_path / "x", b"old")
    with publish(tmp_path / "x", anonymous=anonymous) as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "x").read_bytes() == b"old"
    assert (tmp_path / "x").read_bytes() == b"new"


@posix
@both_ways
def test_a_full_disk_is_an_error_and_the_old_file_is_intact(tmp_path, anonymous):
    import resource

    write(tmp_path / "x", b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "x", bytes(100_000), anonymous=anonymous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@contextmanager
def ordinary_user():
    """Root may write anywhere; be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@posix
@both_ways
def test_a_folder_without_permission_is_an_error(anonymous):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with ordinary_user(), pytest.raises(PermissionError):
            write(Path(folder, "x"), b"new", anonymous=anonymous)
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == []


@posix
def test_a_write_protected_file_is_not_replaced():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        write(path, b"old")
        os.chmod(path, 0o444)
        os.chmod(folder, 0o777)
        with ordinary_user(), pytest.raises(PermissionError, match="write-protected"):
            write(path, b"new")
        assert path.read_bytes() == b"old"


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError, match="cannot replace a folder"):
        write(tmp_path / "x", b"new")


@posix
@both_ways
def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(tmp_path, anonymous):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x", b"new", anonymous=anonymous)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "x").st_mode) == 0o640
    os.chmod(tmp_path / "x", 0o604)
    write(tmp_path / "x", b"newer", anonymous=anonymous)
    assert stat.S_IMODE(os.stat(tmp_path / "x").st_mode) == 0o604


@posix
def test_a_symlink_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "x", b"old")
    (tmp_path / "latest").symlink_to("elsewhere/x")
    write(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "elsewhere" / "x").read_bytes() == b"new"


@posix
def test_a_device_is_written_to_and_not_replaced():
    write("/dev/null", b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_name_as_long_as_the_file_system_allows_works(tmp_path):
    name = "x" * 255
    write(tmp_path / name, b"new", anonymous=False)
    assert os.listdir(tmp_path) == [name]


@posix
def test_abandoned_drafts_go_with_the_next_save_and_those_being_written_stay(tmp_path):
    abandoned = tmp_path / ".x.0123456789abcdef.partial"
    abandoned.write_bytes(b"half")
    (tmp_path / ".y.0123456789abcdef.partial").write_bytes(b"of another target")
    with publish(tmp_path / "x", anonymous=False) as slow:
        slow.write(b"slow")
        write(tmp_path / "x", b"quick", anonymous=False)
        assert not abandoned.exists()
        assert (tmp_path / "x").read_bytes() == b"quick"
    assert (tmp_path / "x").read_bytes() == b"slow"
    assert sorted(os.listdir(tmp_path)) == [".y.0123456789abcdef.partial", "x"]


def killed(folder, kills, way, tmpdir):
    """Kill a process while it overwrites a good checkpoint, at ``kills`` moments; count what was found after each."""
    script = str(Path(__file__).with_name("kill_while_saving.py"))
    env = {**os.environ, "TMPDIR": str(tmpdir)}
    done = subprocess.run([sys.executable, script, folder, str(kills), way], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has torch loaded")


@linux
@pytest.mark.parametrize("way", ["nameless", "named"])
@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_while_saving_loses_no_checkpoint_and_leaks_nothing(tmp_path, way, kills):
    (tmp_path / "tmp").mkdir()
    counts = killed(tmp_path / "checkpoints", kills, way, tmp_path / "tmp")
    assert counts["lost"] == 0
    assert counts["old"] + counts["new"] == kills
    assert counts["leaked_after_next_save"] == 0
    assert os.listdir(tmp_path / "tmp") == []
    if way == "nameless":
        assert counts["leaked"] == 0


def test_a_folder_that_was_moved_aside_does_not_come_back_when_the_file_is_gone(tmp_path):
    aside, other = tmp_path / ".x.0123456789abcdef.previous", tmp_path / ".x.y.0123456789abcdef.previous"
    for folder in (aside, other):
        folder.mkdir()
        (folder / ".metadata").touch()
    with pytest.raises(IsADirectoryError, match="cannot replace a folder"), publish(tmp_path / "x"):
        pass  # it is the checkpoint as long as nothing else is there
    (tmp_path / "x").rename(aside)
    (tmp_path / "x").touch()
    with publish(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert not aside.exists()
    assert other.exists()
