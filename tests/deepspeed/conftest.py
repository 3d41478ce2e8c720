import os
import subprocess
import sys

import pytest

# The folder has the name of a package that is installed: what the tests share is found here, without the folder's name.
sys.path.insert(0, os.path.dirname(__file__))

_BUILD = "from deepspeed.ops.op_builder.cpu import {0} as builder; builder().load()"


def build(builder):
    """Have one of DeepSpeed's native parts built, or see that it is.

    In a process of its own that nobody ends: workers are ended after a minute, and a build that is ended leaves a lock
    behind which every later one waits for.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _BUILD.format(builder)]
    made = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    output, _ = made.communicate()
    assert made.returncode == 0, output


@pytest.fixture(scope="session")
def cpu_optimizer():
    """DeepSpeed's Adam for CPUs is built."""
    build("CPUAdamBuilder")
