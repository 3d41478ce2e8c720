"""Processes that save a sharded checkpoint together are killed at random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has torch loaded")


@linux
@pytest.mark.parametrize("kills", [3, pytest.param(90, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_the_old_or_the_new_one_is_there_and_survivors_end(kills, tmp_path):
    script = Path(__file__).with_name("kill_sharded_save.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "checkpoints", str(kills), str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    leaked = counts.pop("leaked")
    assert counts.keys() == {"old", "new", "leaked after the next save", "slow survivors"}
    assert counts["old"] + counts["new"] == kills
    assert counts["leaked after the next save"] == counts["slow survivors"] == 0
    assert leaked <= kills
