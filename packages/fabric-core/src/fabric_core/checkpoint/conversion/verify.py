"""Comparing a checkpoint of any format with the sizes, hashes and checksums that were stored with it."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING, Final

from fabric_core.checkpoint.conversion.describe import describe, open_binary
from fabric_core.checkpoint.foreign import find_foreign
from fabric_core.checkpoint.safetensors_io import is_safetensors
from fabric_core.checkpoint.sharded.index import Index, read_index
from fabric_core.checkpoint.sharded.layout import METADATA, is_sharded
from fabric_core.checkpoint.sharded.manifest import manifest_of
from fabric_core.checkpoint.sharded.manifest import verify as verify_manifest
from fabric_core.checkpoint.sharded.read import open_folder

if TYPE_CHECKING:
    from fabric_core.types import Path

_BLOCK: Final = 4 * 2**20  # bytes


def verify(path: Path) -> tuple[list[str], str]:
    """One line for each damage, and what was compared. Everything is read once, and nothing is loaded.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: so damaged that nothing can be compared, or no checkpoint.
    """
    if not is_sharded(path):
        return _verify_other(path)
    with open_folder(path) as folder:
        if manifest_of(folder) is None:
            index = read_index(folder.read_all(METADATA), f"{folder.name}/{METADATA}")
            return _beyond_the_end(index, folder.sizes()), "sizes; only Fabric stores hashes"
    return verify_manifest(path), "sizes and hashes"


def _beyond_the_end(index: Index, sizes: dict[str, int]) -> list[str]:
    """A line for each file that is missing, or ends before what the index says is in it."""
    ends: dict[str, int] = {}
    for place in (*index.objects.values(), *(chunk.place for chunks in index.chunks.values() for chunk in chunks)):
        ends[place.file] = max(ends.get(place.file, 0), place.start + place.length)
    missing = [f"{file} is missing" for file in sorted(ends) if file not in sizes]
    return missing + [
        f"{file} has {sizes[file]} bytes, and should have {end} at least"
        for file, end in sorted(ends.items())
        if sizes.get(file, end) < end
    ]


def _verify_other(path: Path) -> tuple[list[str], str]:
    foreign = find_foreign(path)
    if foreign is not None:
        return _verify_folder(foreign.path)
    if is_safetensors(path):
        describe(path)  # the library refuses files whose length is not what the header says
        return [], "sizes; the format has no checksums"
    return _verify_file(path)


def _verify_folder(folder: str) -> tuple[list[str], str]:
    """The files that ``torch.save`` has written, of whatever layout."""
    files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    damages = []
    for file in sorted(file for file in files if _begins_like_an_archive(file)):
        name = os.path.relpath(file, folder)
        try:
            with zipfile.ZipFile(file) as archive:
                damages += [f"{name}: {damage}" for damage in _wrong_records(archive)]
        except zipfile.BadZipFile as error:
            damages.append(f"{name} is damaged: {error}")
    return damages, "checksums, of the files that have some"


def _begins_like_an_archive(file: str) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _verify_file(path: Path) -> tuple[list[str], str]:
    describe(path)
    with open_binary(path) as file, zipfile.ZipFile(file) as archive:
        if all(record.CRC == 0 for record in archive.infolist()):
            return [], "nothing: the file was written without checksums"
        return _wrong_records(archive), "checksums"


def _wrong_records(archive: zipfile.ZipFile) -> list[str]:
    records = [record for record in archive.infolist() if record.CRC]
    return [problem for record in records if (problem := _wrong_record(archive, record))]


def _wrong_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> str | None:
    try:
        with archive.open(record) as content:
            while content.read(_BLOCK):
                pass
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"{record.filename} has changed: {error}"
    return None
