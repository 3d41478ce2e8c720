"""Where the user's configuration comes from: a dictionary, a JSON file, or the file that a variable names."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_deepspeed.settings import CONFIG_PATH


@dataclass(frozen=True)
class Source:
    """The user's configuration, a copy, with words for where it was found."""

    document: dict[str, Any]
    words: str


def read_source(given: Any) -> Source | None:
    """What the user gave; ``None`` if nothing, and the variable names no file either.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or a key is in it twice.
        TypeError: neither a dictionary nor a path, or the file holds something else than an object.
    """
    if isinstance(given, Mapping):
        return Source(copy.deepcopy(dict(given)), "config")
    if given is None:
        named = CONFIG_PATH.text()
        return None if not named else _read_file(named, f" (variable {CONFIG_PATH.name})")
    if isinstance(given, (str, os.PathLike)):
        return _read_file(os.fspath(given), " (argument config)")
    raise InvalidTypeError(
        f"config is a {type(given).__name__}: expected a dictionary, the path of a JSON file, or a DeepSpeedConfig."
    )


def _read_file(path: str, origin: str) -> Source:
    words = f"the file {os.path.abspath(path)!r}{origin}"
    if path.lstrip().startswith("{"):
        raise InvalidArgumentError(
            f"config={path!r} is text, not a path: pass json.loads(text), or the path of a file."
        )
    if not os.path.isfile(path):
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(
            f"DeepSpeed's configuration, {words}, {what}. The path is {path!r}, seen from {os.getcwd()!r}."
        )
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _without_twins(pairs, words))
    except JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        raise InvalidArgumentError(
            f"{words} is no JSON: {error.msg}, line {error.lineno}, column {error.colno}: {line.strip()!r}."
        ) from None
    if not isinstance(content, dict):
        raise InvalidTypeError(f"{words} holds a {type(content).__name__}: expected an object, {{...}}.")
    return Source(content, words)


def _without_twins(pairs: list[tuple[str, Any]], words: str) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidArgumentError(f"{words} has keys twice in one object: {', '.join(twice)}. Keep one of each.")
    return content
