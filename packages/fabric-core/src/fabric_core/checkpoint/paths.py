"""Where a checkpoint lies: a local path or the URL of a store. A URL is text all the way, because ``pathlib`` makes
``gs:/bucket`` of ``gs://bucket``.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from fabric_core.errors import InvalidArgumentError, UsageError

if TYPE_CHECKING:
    from fabric_core.types import Path

# Two letters at least: one letter is a Windows drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(::[A-Za-z0-9+.\-:]+)?://")
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):[/\\](?![/\\])")
_LOCAL = ("file", "local")


def resolve(path: Path) -> str:
    """The path as text: a local one without ``file://``, a URL as it is.

    ``InvalidArgumentError`` for a URL that went through ``pathlib`` and lost a slash.
    """
    text = os.fspath(path)
    if isinstance(path, PurePath) and (match := _COLLAPSED.match(text)):
        fixed = f"{match[1]}://{text[match.end() :]}"
        raise InvalidArgumentError(
            f"{path!r} was a URL before pathlib dropped one of its slashes. Pass it as text: {fixed!r}."
        )
    if is_local_file_protocol(text):
        return unquote(text.split("://", 1)[1]) or "/"
    return text


def is_local_file_protocol(path: Path) -> bool:
    """Whether the path is a URL of the local file system, as ``file:///data/a.ckpt``."""
    scheme, found, _ = os.fspath(path).partition("://")
    return bool(found) and scheme.lower() in _LOCAL


def is_remote(path: Path) -> bool:
    """Whether the path is the URL of a store other than the local file system."""
    text = os.fspath(path)
    return bool(_URL.match(text)) and not is_local_file_protocol(text)


def is_http(path: Path) -> bool:
    """Whether the path is a web address."""
    return os.fspath(path).lower().startswith(("http://", "https://"))


def get_filesystem(path: Path, **kwargs: Any) -> Any:
    """The fsspec file system that ``path`` lies on; ``kwargs`` are its options.

    ``UsageError`` if fsspec is not installed.
    """
    filesystem, _ = open_filesystem(path, **kwargs)
    return filesystem


def open_filesystem(path: Path, **kwargs: Any) -> tuple[Any, str]:
    """The fsspec file system and the path inside it."""
    try:
        core = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise UsageError(
            f"{os.fspath(path)!r} needs fsspec to be read or written: pip install 'fabric-core[remote]'."
        ) from error
    filesystem, inside = core.url_to_fs(resolve(path), **kwargs)
    return filesystem, str(inside)
