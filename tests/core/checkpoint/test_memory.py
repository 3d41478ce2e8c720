"""Neither saving nor loading holds a second copy of the state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and resets its peak")
def test_saving_and_loading_need_next_to_no_memory_beyond_the_live_state(tmp_path):
    script = str(Path(__file__).with_name("peak_memory.py"))
    output = subprocess.run(
        [sys.executable, script, str(tmp_path / "x.ckpt")], check=True, capture_output=True, text=True
    ).stdout
    peak = json.loads(output)
    assert peak["save"] < 0.05
    assert peak["load"] < 0.1
