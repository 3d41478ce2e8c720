"""Getting at bitsandbytes: late, quietly, and with an error that says what to do where it cannot be had."""

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from fabric_bnb import backend


def python(code, *path):
    """Run code in a fresh interpreter with folders in front of what is installed."""
    lines = [f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}", textwrap.dedent(code)]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)


def succeeds(code, *path):
    done = python(code, *path)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def broken(tmp_path):
    """An installation whose import fails as one does that was built for another system."""
    package = tmp_path / "broken" / "bitsandbytes"
    package.mkdir(parents=True)
    text = 'raise OSError("libbitsandbytes_cpu.so: cannot open shared object file")\n'
    package.joinpath("__init__.py").write_text(text)
    return package.parent


@pytest.fixture
def without_library(tmp_path):
    """The real package without its native libraries."""
    package = Path(find_spec("bitsandbytes").origin).parent
    copytree(package, tmp_path / "bare" / "bitsandbytes", ignore=ignore_patterns("*.so", "*.dll", "__pycache__"))
    return tmp_path / "bare"


def test_naming_the_precisions_imports_neither_torch_nor_bitsandbytes():
    succeeds("""
        from fabric_core.registry import get_registry
        assert "bnb-nf4" in get_registry().names("precision")
        get_registry().has_hook("fabric_validate")
        import fabric_bnb, fabric_bnb.hooks
        dir(fabric_bnb)
        assert "bitsandbytes" not in sys.modules
        assert "torch" not in sys.modules
    """)


def test_only_choosing_one_imports_bitsandbytes():
    succeeds("""
        from fabric_core import Fabric
        import fabric_bnb.precision
        Fabric(accelerator="cpu", devices=1, precision="bf16-true")
        assert "bitsandbytes" not in sys.modules
        Fabric(accelerator="cpu", devices=1, precision="bnb-nf4")
        assert "bitsandbytes" in sys.modules
    """)


def test_the_import_is_silent_and_leaves_no_trace():
    done = succeeds("""
        import logging, os, warnings
        import torch
        from fabric_core import Fabric

        def state():
            level = logging.getLogger("bitsandbytes").level
            return os.environ.get("BITSANDBYTES_NOWELCOME"), list(warnings.filters), level

        from fabric_bnb.precision import BitsandbytesPrecision
        before = state()
        BitsandbytesPrecision("nf4")
        assert "bitsandbytes" in sys.modules
        assert state() == before
    """)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_the_user_set_stays_set_even_if_the_import_fails(broken):
    succeeds(
        """
        import logging, os, warnings
        os.environ["BITSANDBYTES_NOWELCOME"] = "0"
        logging.getLogger("bitsandbytes").setLevel(logging.DEBUG)
        from fabric_bnb.precision import BitsandbytesPrecision
        filters = list(warnings.filters)
        try:
            BitsandbytesPrecision("nf4")
        except ImportError:
            assert os.environ["BITSANDBYTES_NOWELCOME"] == "0"
            assert logging.getLogger("bitsandbytes").level == logging.DEBUG
            assert warnings.filters == filters
        else:
            raise AssertionError
        """,
        broken,
    )


REFUSED = """
    from fabric_core import Fabric
    import torch
    from torch import nn
    for precision in "bnb-nf4", "int8-training":
        try:
            Fabric(accelerator="cpu", devices=1, precision=precision)
        except ImportError as error:
            print(type(error).__name__, error, "from", repr(error.__cause__))
    other = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    assert other.setup(nn.Linear(64, 64))(torch.ones(2, 64)).isfinite().all()
"""


def test_without_the_package_the_error_says_what_to_install_and_others_work():
    done = succeeds('sys.modules["bitsandbytes"] = None\n' + textwrap.dedent(REFUSED))
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith("PluginLoadError Quantised precisions need bitsandbytes, which is not installed: ")
    assert "pip install bitsandbytes" in first


def test_a_package_that_cannot_be_imported_is_an_error_with_its_cause_and_others_work(broken):
    first, second = succeeds(REFUSED, broken).stdout.splitlines()
    assert first == second
    assert first.startswith("PluginLoadError bitsandbytes is installed, but importing it failed with OSError: libbits")
    assert "pip install --force-reinstall" in first
    assert "from OSError('libbitsandbytes_cpu.so: cannot open" in first


def test_the_cpu_can_do_without_the_native_library_and_other_devices_cannot(without_library):
    done = succeeds(
        """
        import torch
        from fabric_bnb import BitsandbytesPrecision
        from fabric_core import Fabric
        from torch import nn
        for precision in "bnb-nf4-dq", "bnb-int8":
            model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(nn.Linear(64, 64))
            assert model(torch.ones(2, 64)).isfinite().all()
        try:
            BitsandbytesPrecision.nf4(device="cuda")
        except ImportError as error:
            print(type(error).__name__, error)
        """,
        without_library,
    )
    assert done.stdout.startswith("PluginLoadError bitsandbytes has no native library that works with this machine's")
    assert "`python -m bitsandbytes`" in done.stdout


def test_the_installed_package_is_whole():
    backend.load("cpu")
    backend.check_native_library()
