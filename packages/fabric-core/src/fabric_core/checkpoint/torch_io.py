"""Checkpoints as single files in torch's own format: whatever reads ``torch.save`` files reads these.

Files of weights called ``.safetensors`` are read as well.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from fabric_core.abc.checkpoint import CheckpointIO
from fabric_core.checkpoint.commit import publish
from fabric_core.checkpoint.lazy import OpenCheckpoint, is_archive, open_mapped
from fabric_core.checkpoint.paths import is_http, is_remote, open_filesystem, resolve
from fabric_core.checkpoint.safetensors_io import is_safetensors, load_safetensors, open_safetensors
from fabric_core.checkpoint.sharded.publication import is_folder_to_replace
from fabric_core.errors import (
    CheckpointError,
    FabricError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsafeCheckpointError,
)

if TYPE_CHECKING:
    from fabric_core.types import MapLocation, Path


class TorchCheckpointIO(CheckpointIO):
    """One file per checkpoint, complete or absent, opened without running code from it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to the file or object ``path``. What was there before stays until all is written.

        The local folder of a checkpoint, sharded or of a plugin's layout, is replaced, too.

        Raises:
            InvalidTypeError: ``storage_options`` were given; there are none.
            InvalidArgumentError: ``path`` says safetensors, which torch then takes it for when reading.
            CheckpointError: something in ``checkpoint`` cannot be pickled.
            OSError: as the system says.
        """
        if storage_options is not None:
            raise InvalidTypeError(
                f"{type(self).__name__} has no storage options, got {storage_options!r}. Leave them out, or pass a "
                "CheckpointIO that knows them to Fabric(plugins=[...])."
            )
        if is_safetensors(path):
            raise InvalidArgumentError(
                f"{os.fspath(path)!r} would be taken for a file of safetensors, which hold one module's weights and no "
                "more. Save under another name, such as .ckpt; the weights can be had from it: "
                "fabric checkpoint convert x.ckpt x.safetensors --key model"
            )
        if is_folder_to_replace(path):
            from fabric_core.checkpoint.sharded.draft import replace_by_file

            replace_by_file(path, lambda draft: _write(checkpoint, draft))
        else:
            _write(checkpoint, path)

    def load_checkpoint(
        self, path: Path, map_location: MapLocation = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, an object or a web address; tensors are in memory, on the CPU unless ``map_location`` is given.

        Raises:
            FileNotFoundError: nothing is there.
            CheckpointError: it is damaged, or holds objects that safe loading refuses.
        """
        safe = weights_only is not False
        location: Any = "cpu" if map_location is None else map_location
        content: dict[str, Any]
        with _explained(path, safe):
            if is_safetensors(path):
                content = load_safetensors(path if is_remote(path) else _existing(path), location)
            elif is_http(path):
                content = torch.hub.load_state_dict_from_url(
                    resolve(path), map_location=location, progress=False, weights_only=safe
                )
            elif is_remote(path):
                filesystem, inside = open_filesystem(path)
                with filesystem.open(inside, "rb") as file:
                    content = torch.load(file, map_location=location, weights_only=safe)
            else:
                local = _existing(path)
                is_archive(local)  # for its error: what torch says of a cut file differs by where it was cut
                content = torch.load(local, map_location=location, weights_only=safe)
        return content

    @contextmanager
    def open_checkpoint(self, path: Path, weights_only: bool | None = None) -> Iterator[OpenCheckpoint]:
        """The checkpoint, opened with its tensors still in the file where possible.

        With ``weights_only=False`` they are all read first: code in the file may look at them.
        """
        opened: OpenCheckpoint | None = None
        if not is_remote(path) and (weights_only is not False or is_safetensors(path)):
            with _explained(path, True):
                local = _existing(path)
                opened = open_safetensors(local) if is_safetensors(local) else open_mapped(local)
        if opened is None:
            opened = OpenCheckpoint(self.load_checkpoint(path, weights_only=weights_only))
        try:
            yield opened
        finally:
            opened.close()

    def remove_checkpoint(self, path: Path) -> None:
        """Remove the file or folder; no error if it is absent."""
        if is_remote(path):
            filesystem, inside = open_filesystem(path)
            if filesystem.exists(inside):
                filesystem.rm(inside, recursive=True)
            return
        local = resolve(path)
        if os.path.isdir(local) and not os.path.islink(local):
            shutil.rmtree(local)
        else:
            with suppress(FileNotFoundError):
                os.unlink(local)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with publish(path) as file:
        try:
            torch.save(checkpoint, file)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"The state for {os.fspath(path)!r} cannot be written: {error}. Store plain values and state dicts."
            ) from error
        except RuntimeError as error:
            # torch reports a failed write as a position that does not add up; the reason is further back.
            reason = _system_error_behind(error)
            if reason is None:
                raise
            raise OSError(reason.errno, reason.strerror, os.fspath(path)) from error


def _system_error_behind(error: BaseException) -> OSError | None:
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


def _existing(path: Path) -> str:
    local = resolve(path)
    if os.path.isdir(local):
        raise IsADirectoryError(f"{local!r} is a folder, not a checkpoint file.")
    if not os.path.exists(local):
        raise FileNotFoundError(f"There is no checkpoint at {local!r} (from {os.getcwd()!r}).")
    return local


@contextmanager
def _explained(path: Path, safe: bool) -> Iterator[None]:
    """Turn what reading may raise into an error that names the file and what to do."""
    try:
        yield
    except (FabricError, OSError, MemoryError, Warning):  # a warning that is an error says nothing of the file
        raise
    except Exception as error:
        name = os.fspath(path)
        refused = _refused_names(name) if safe and isinstance(error, pickle.UnpicklingError) else []
        if not refused:
            raise CheckpointError(f"{name!r} cannot be read, it may be damaged: {error}") from error
        raise UnsafeCheckpointError(
            f"{name!r} was NOT loaded: it holds {', '.join(refused)}, and building these objects runs code.\n"
            "Whoever wrote the file decides what that code does; it can do anything that you can do on this machine.\n"
            "If you know these names and trust them: torch.serialization.add_safe_globals([...]), then load again.\n"
            "If you trust the origin of the whole file: pass weights_only=False."
        ) from error


def _refused_names(path: str) -> list[str]:
    """What safe loading stumbles over in the file; empty if that is not the problem or cannot be told."""
    if is_remote(path):
        return ["objects that safe loading does not know"]
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(resolve(path)))
    except Exception:  # only for a message: the real error is on its way
        return []
