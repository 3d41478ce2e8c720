"""The types that programs see, as mypy in strict mode reads them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
HERE = Path(__file__).parent
OPTIONS = ["--strict", "--no-error-summary", "--no-color-output", "--show-error-codes", "--config-file="]


def test_a_typical_program_has_no_type_errors_and_mistakes_are_found(tmp_path):
    marked = set()
    for name in ("user_code.py", "wrong_code.py"):
        lines = Path(shutil.copy(HERE / name, tmp_path)).read_text().splitlines()
        marked |= {(name, n, m[1]) for n, line in enumerate(lines, 1) if (m := re.search(r"# error: ([\w-]+)$", line))}
    command = [sys.executable, "-m", "mypy", *OPTIONS, "user_code.py", "wrong_code.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    found = re.findall(r"(?m)^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", result.stdout)
    assert {(name, int(line), code) for name, line, code in found} == marked, result.stdout + result.stderr
