"""Paths and URLs are told apart, and a URL is never collapsed."""

import subprocess
import sys
from pathlib import Path

import pytest

from fabric_core.checkpoint.paths import get_filesystem, is_http, is_local_file_protocol, is_remote, resolve
from fabric_core.errors import InvalidArgumentError


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://b/x", "memory://x", "simplecache::s3://b/x", "https://h/x"])
def test_stores_are_remote(url):
    assert is_remote(url)
    assert resolve(url) == url


@pytest.mark.parametrize("path", ["x", "/a/x", Path("a/x"), "file:///a/x", "C:/a", r"C:\a", "a:b/x", "."])
def test_the_rest_is_local(path):
    assert not is_remote(path)


def test_a_file_url_is_a_local_path():
    assert is_local_file_protocol("file:///a/b%20c")
    assert resolve("file:///a/b%20c") == "/a/b c"
    assert not is_local_file_protocol("/a/file")


@pytest.mark.skipif(sys.platform == "win32", reason="pathlib turns the slashes there")
def test_a_url_that_pathlib_collapsed_is_refused_with_the_fixed_text():
    with pytest.raises(InvalidArgumentError, match="'gs://bucket/x'"):
        resolve(Path("gs://bucket/x"))


def test_web_addresses():
    assert is_http("HTTPS://host/x")
    assert not is_http("s3://host/x")


def test_the_file_system_of_a_url():
    assert get_filesystem("memory://x").protocol == "memory"
    assert "file" in get_filesystem("some/path").protocol


def test_importing_the_package_loads_neither_torch_nor_fsspec():
    code = (
        "import sys, fabric_core.checkpoint as c; assert not {'torch', 'fsspec'} & set(sys.modules);"
        "c.TorchCheckpointIO; assert 'fsspec' not in sys.modules; assert set(dir(c)) == set(c.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_lazy_name_is_there():
    import fabric_core.checkpoint as package

    assert all(getattr(package, name).__name__ == name for name in package.__all__)


def test_without_fsspec_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['fsspec'] = sys.modules['fsspec.core'] = None\n"
        "from fabric_core.checkpoint.commit import publish\n"
        "try:\n  publish('memory://x').__enter__()\n"
        "except RuntimeError as error:\n  assert 'fabric-core[remote]' in str(error)\n"
        "else:\n  raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
