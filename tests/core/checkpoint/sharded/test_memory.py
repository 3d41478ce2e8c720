"""Neither saving nor loading a sharded checkpoint holds a copy of the state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and resets its peak")
def test_saving_and_loading_need_small_buffers_only(tmp_path):
    script = Path(__file__).with_name("peak_memory_sharded.py")
    done = subprocess.run([sys.executable, script, tmp_path / "ck"], check=True, capture_output=True, text=True)
    peak = json.loads(done.stdout)
    assert peak["save"] < 0.01
    assert peak["load"] < 0.01
    assert peak["convert"] < 0.1  # one buffer of 16 MB; the state has 262
