"""``manifest.json``: what files belong to a checkpoint, how long they are, and what they hash to.

It is written when all else is on disk. It names no path of the machine it was written on.
"""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fabric_core.checkpoint.sharded.layout import EXTRAS, MANIFEST, METADATA
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.folder import Folder
    from fabric_core.types import Path

FORMAT: Final = 1
ALGORITHM: Final = "crc32"
_BLOCK: Final = 4 * 2**20  # bytes


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hash of one file, the hash in hexadecimal."""

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The content of the file.

    Attributes:
        files: name to size and hash; of all files but the manifest itself, and copies of files listed here.
        world_size: how many processes wrote.
        torch: the version of torch that wrote.
        fabric: the version of Fabric that wrote.
        generation: the name of the save, which is part of file names in stores; empty in local folders.
        values: the names whose tensors all ranks wrote and that are of no module and no optimizer.
    """

    files: dict[str, FileRecord]
    world_size: int = 1
    torch: str = ""
    fabric: str = ""
    generation: str = ""
    values: tuple[str, ...] = ()

    def dumps(self) -> bytes:
        """The text of the file."""
        content = {
            "format": FORMAT,
            "generation": self.generation,
            "world_size": self.world_size,
            "torch": self.torch,
            "fabric": self.fabric,
            "values": list(self.values),
            "files": {name: {"size": file.size, ALGORITHM: file.digest} for name, file in sorted(self.files.items())},
        }
        return json.dumps(content, indent=1).encode()

    def name(self, file: str) -> str:
        """How ``.metadata`` or ``meta.pt`` is named in this checkpoint."""
        return with_generation(file, self.generation)


def fabric_version() -> str:
    """The installed version of fabric-core; empty if it is not installed but only lies on the path."""
    reader = importlib.import_module("fabric_core.registry.metadata").reader
    try:
        return str(reader.version("fabric-core"))
    except reader.PackageNotFoundError:
        return ""


def with_generation(file: str, generation: str) -> str:
    """The file's name with the name of the save before its ending: ``__0_0.distcp`` is ``__0_0.GENERATION.distcp``."""
    if not generation:
        return file
    if file == METADATA:
        return f"{METADATA}.{generation}"
    stem, _, ending = file.rpartition(".")
    return f"{stem}.{generation}.{ending}"


def parse_manifest(content: bytes, name: str) -> Manifest:
    """The manifest from the content of the file ``name``, which is for messages. ``CheckpointError`` if damaged."""
    try:
        found = json.loads(content)
        files = {file: FileRecord(int(entry["size"]), str(entry[ALGORITHM])) for file, entry in found["files"].items()}
        known = {key: found[key] for key in ("world_size", "torch", "fabric", "generation")}
        values = tuple(str(value) for value in found.get("values", ()))  # earlier versions wrote none
        version = int(found["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name!r} is damaged, it is no manifest of a checkpoint: {error!r}") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{name!r} has format {version}; this version of Fabric reads up to {FORMAT}. Update fabric-core."
        )
    return Manifest(files, **known, values=values)


def manifest_of(folder: Folder) -> Manifest | None:
    """The folder's manifest; ``None`` if it has none, because something else wrote the checkpoint."""
    try:
        content = folder.read_all(MANIFEST)
    except FileNotFoundError:
        return None
    return parse_manifest(content, f"{folder.name}/{MANIFEST}")


def check_sizes(folder: Folder, manifest: Manifest) -> list[str]:
    """One line for each file that is missing or has another size than the manifest says."""
    sizes = folder.sizes()
    problems = []
    for name, file in manifest.files.items():
        if name not in sizes:
            problems.append(f"{name} is missing")
        elif sizes[name] != file.size:
            problems.append(f"{name} has {sizes[name]} bytes, not {file.size}")
    return problems


def verify(path: Path) -> list[str]:
    """Read all files of the checkpoint and compare their hashes with the manifest; one line for each problem.

    Any one process may call it. A checkpoint without a manifest has nothing to compare with, which is a problem too.

    Raises:
        FileNotFoundError: no sharded checkpoint is there.
        CheckpointError: the manifest itself is damaged.
    """
    from fabric_core.checkpoint.sharded.read import open_folder

    with open_folder(path) as folder:
        manifest = manifest_of(folder)
        if manifest is None:
            return [f"there is no {MANIFEST}: the checkpoint was not written by Fabric, nothing can be compared"]
        problems = check_sizes(folder, manifest)
        broken = {problem.partition(" ")[0] for problem in problems}
        problems += _wrong_hashes(folder, manifest, (name for name in manifest.files if name not in broken))
        return problems + _wrong_copies(folder, manifest)


def _wrong_hashes(folder: Folder, manifest: Manifest, names: Iterable[str]) -> list[str]:
    buffer = memoryview(bytearray(_BLOCK))
    problems = []
    for name in names:
        file, found = manifest.files[name], 0
        for start in range(0, file.size, _BLOCK):
            part = buffer[: min(_BLOCK, file.size - start)]
            folder.read_into(name, start, part)
            found = zlib.crc32(part, found)
        if f"{found:08x}" != file.digest:
            problems.append(f"{name} has changed: its {ALGORITHM} is {found:08x}, not {file.digest}")
    return problems


def _wrong_copies(folder: Folder, manifest: Manifest) -> list[str]:
    """In stores: the copies under the names that plain readers look for."""
    problems = []
    for name in (METADATA, EXTRAS) if manifest.generation else ():
        try:
            digest = f"{zlib.crc32(folder.read_all(name)):08x}"
        except FileNotFoundError:
            digest = ""
        original = manifest.files.get(manifest.name(name))
        if original is not None and digest != original.digest:
            problems.append(f"{name} is not the copy of {manifest.name(name)} that it should be")
    return problems
