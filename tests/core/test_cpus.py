import os
import subprocess
import sys

import pytest

from fabric_core.cpus import cpu_quota


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_only_cpus_this_process_may_use_count():
    one = min(os.sched_getaffinity(0))
    use_one = f"import os; os.sched_setaffinity(0, {{{one}}})"
    code = f"{use_one}; from fabric_core.cpus import usable_cpus; print(usable_cpus())"
    assert subprocess.check_output([sys.executable, "-c", code]).strip() == b"1"


@pytest.mark.parametrize(("text", "cpus"), [("150000 100000", 1.5), ("max 100000", None), ("nonsense", None)])
def test_the_quota_of_a_container_is_read(tmp_path, text, cpus):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cpus


def test_without_a_file_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "cpu.max") is None
