"""An opened checkpoint: its structure is there, its tensors' bytes are read when and where they are wanted.

torch can open a file so that tensors are windows on it (``mmap``). That is quick and safe to do, but no way to leave
them: a window dies with the file, and copying through it brings every byte into memory twice. So the windows serve as
a table of contents here. Their addresses say where in the file the bytes are, and the bytes are read from there
straight into the memory that is to hold them, that of a live parameter for one.
"""

from __future__ import annotations

import ctypes
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from fabric_core.checkpoint.dtensors import part_for
from fabric_core.checkpoint.tree import SAFE_LEAVES, leaves
from fabric_core.errors import CheckpointError

_CHUNK: Final = 16 * 2**20  # bytes; what passes through a buffer on its way to another dtype or device
_WORTH_THREADS: Final = 32 * 2**20  # bytes
T = TypeVar("T")


class OpenCheckpoint:
    """What a checkpoint holds. This base is for content that is in memory already.

    Attributes:
        content: the stored object. Tensors in it may be windows on the file until ``own`` has run over them.
        is_folder: it is a sharded checkpoint, in which every state has a name and lies beside the others.
    """

    is_folder: bool = False

    def __init__(self, content: Any) -> None:
        self.content = content

    def is_window(self, tensor: Tensor) -> bool:
        """Whether the tensor's bytes are still in the file."""
        return False

    def is_alone(self, tensor: Tensor) -> bool:
        """Whether no other tensor of the checkpoint shares the window's memory."""
        return False

    def read(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """For each pair, write the values of a tensor of the checkpoint to a destination.

        A destination has the same shape, and any dtype, layout and device; of one that is spread over ranks, this
        rank's part is written. Every rank must call it where the checkpoint is read by one for all.
        """
        parts = [part_for(window, destination) for window, destination in pairs]
        in_parallel(lambda part: self.read_into(*part), parts, sum(part.nbytes for part, _ in parts))

    @torch.no_grad()
    def read_into(self, window: Tensor, destination: Tensor) -> None:
        """Write the values of a window, or of a view of one, to memory of the same shape."""
        destination.copy_(window)

    def values(self, tree: Any) -> Any:
        """``tree`` with stored objects that are no tensors in their places, wherever they were left aside at first."""
        return tree

    def own(self, tree: Any) -> Any:
        """``tree`` with all tensors in memory of their own; in place where possible.

        Those that shared some in the checkpoint share it again, where the checkpoint tells.
        """
        return tree

    def rest(self, asked: Iterable[Any]) -> dict[Any, Any]:
        """What a load returns beside the names that were asked for. Not in memory before ``own``."""
        asked = set(asked)
        return {key: value for key, value in self.content.items() if key not in asked}

    def close(self) -> None:
        """Windows that remain must not be used any more."""


class MappedCheckpoint(OpenCheckpoint):
    """A local file whose tensors are windows on it.

    Attributes:
        path: for messages.
    """

    def __init__(self, content: Any, windows: Iterable[Tensor], path: str, reader: FileReader | None) -> None:
        super().__init__(content)
        self.path = path
        self._windows = {id(tensor): tensor for tensor in windows}  # kept, so that no id is used twice
        self._users = Counter(tensor.untyped_storage().data_ptr() for tensor in self._windows.values())
        self._reader = reader
        self._owned: dict[int, torch.UntypedStorage] = {}

    def is_window(self, tensor: Tensor) -> bool:
        """Whether the tensor's bytes are still in the file."""
        return id(tensor) in self._windows

    def is_alone(self, tensor: Tensor) -> bool:
        """Whether no other tensor of the checkpoint shares the window's memory."""
        return self._users[tensor.untyped_storage().data_ptr()] == 1

    @torch.no_grad()
    def read_into(self, window: Tensor, destination: Tensor) -> None:
        """Write the values of a window, or of a view of one, to memory of the same shape."""
        if window.numel() == 0:
            return
        if self._reader is None:
            destination.copy_(window)
        elif _same_bytes(window, destination):
            self._reader.read(window.data_ptr(), destination.data_ptr(), window.nbytes)
        elif window.is_contiguous() and destination.is_contiguous():
            self._read_in_pieces(window.view(-1), destination.view(-1))
        else:
            self._read_in_pieces(window, destination)

    def _read_in_pieces(self, window: Tensor, destination: Tensor) -> None:
        """Through a small buffer, cut along the dimension whose steps in the file are the longest."""
        assert self._reader is not None
        dim = max(range(window.dim()), key=window.stride)
        step = window.stride(dim) * window.element_size()
        length = max(1, _CHUNK // step) if step else window.size(dim)
        for first in range(0, window.size(dim), length):
            count = min(length, window.size(dim) - first)
            source, target = window.narrow(dim, first, count), destination.narrow(dim, first, count)
            buffer = torch.empty(span(source), dtype=window.dtype)
            self._reader.read(source.data_ptr(), buffer.data_ptr(), buffer.nbytes)
            target.copy_(buffer.as_strided(source.size(), source.stride()))

    @torch.no_grad()
    def own(self, tree: Any) -> Any:
        """``tree`` itself, its tensors in memory of their own; those that shared some, share it again."""
        windows = {id(leaf): leaf for _, leaf in leaves(tree, "") if id(leaf) in self._windows}
        mapped = {storage.data_ptr(): storage for storage in (leaf.untyped_storage() for leaf in windows.values())}
        pairs = [
            (storage, torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage())
            for address, storage in mapped.items()
            if address not in self._owned
        ]
        in_parallel(self._read_storage, pairs, sum(storage.nbytes() for storage, _ in pairs))
        owned = self._owned | {storage.data_ptr(): own for storage, own in pairs}
        # What is remembered is not freed before the end, so only what a tensor elsewhere may share.
        self._owned = {address: own for address, own in owned.items() if self._users[address] > 1}
        for id_, leaf in windows.items():
            storage = owned[leaf.untyped_storage().data_ptr()]
            leaf.set_(storage, leaf.storage_offset(), leaf.size(), leaf.stride())
            del self._windows[id_]
        return tree

    def _read_storage(self, pair: tuple[torch.UntypedStorage, torch.UntypedStorage]) -> None:
        mapped, own = pair
        if self._reader is None:
            own.copy_(mapped, non_blocking=False)
        else:
            self._reader.read(mapped.data_ptr(), own.data_ptr(), mapped.nbytes())

    def close(self) -> None:
        """Windows that remain must not be used any more."""
        self._windows.clear()
        self._owned.clear()
        if self._reader is not None:
            self._reader.close()


class FileReader:
    """Reads what a window shows from the file itself, without touching the window."""

    def __init__(self, fd: int, start: int, path: str) -> None:
        self._fd, self._start, self._size, self._path = os.dup(fd), start, os.fstat(fd).st_size, path

    def covers(self, address: int, length: int) -> bool:
        """Whether the addresses lie within the file's window."""
        return 0 <= address - self._start <= self._size - length

    def read(self, address: int, target: int, length: int) -> None:
        """Bring ``length`` bytes that a window shows at ``address`` to the memory at ``target``."""
        if length == 0:
            return
        view = memoryview((ctypes.c_char * length).from_address(target)).cast("B")
        position, done = address - self._start, 0
        while done < length:
            count = os.preadv(self._fd, [view[done:]], position + done)
            if count == 0:
                raise CheckpointError(f"{self._path!r} ended while it was read: another program cut it short.")
            done += count

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def in_parallel(action: Callable[[T], None], items: Sequence[T], size: int) -> None:
    """Run ``action`` on all items: on a few threads if there are enough bytes to move for that to pay."""
    workers = min(4, torch.get_num_threads(), len(items))
    if workers < 2 or size < _WORTH_THREADS:
        for item in items:
            action(item)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="checkpoint-reader") as pool:
        for _ in pool.map(action, items):
            pass


def open_mapped(path: str) -> MappedCheckpoint | None:
    """Open a local file safely, without reading its tensors.

    ``None`` if it cannot be opened in this way: an old format, or objects in it that may hide tensors.
    ``CheckpointError`` if it begins like a checkpoint and has no end. Whatever ``torch.load`` raises otherwise.
    """
    if not is_archive(path):
        return None
    with open(path, "rb") as file:
        byte_order = _byte_order(file)
        # The open file's own name, where there is one: another file may take the place of `path` at any time.
        name = f"/proc/self/fd/{file.fileno()}"
        name = name if os.path.exists(name) else path
        content = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
        found = [leaf for _, leaf in leaves(content, "")]
        windows = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        for window in windows:
            window.__dict__.pop("_has_been_cloned", None)  # FSDP1's note to itself, in every file of whole weights
        if not all(type(leaf) in SAFE_LEAVES for leaf in found) or not all(map(is_plain_tensor, windows)):
            return None
        reader = find_reader(file.fileno(), windows, path) if byte_order == sys.byteorder else None
        return MappedCheckpoint(content, windows, path, reader)


def is_plain_tensor(tensor: Any) -> bool:
    """Whether the tensor is nothing but a strided view of its memory."""
    return bool(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not tensor.__dict__
    )


def span(tensor: Tensor) -> int:
    """How many elements lie between the tensor's first and last one in memory, both included."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * step for size, step in zip(tensor.size(), tensor.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its piece of memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _same_bytes(window: Tensor, destination: Tensor) -> bool:
    """Whether the window's bytes, as they are in the file, are what belongs at the destination."""
    if destination.device.type != "cpu" or window.dtype != destination.dtype:
        return False
    if window.is_contiguous() and destination.is_contiguous():
        return True
    return bool(window.stride() == destination.stride()) and is_dense(window)


def is_archive(path: str) -> bool:
    """Whether the file is in today's format. ``CheckpointError`` if it begins like one, but was cut off."""
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        complete = zipfile.is_zipfile(file)
    if complete:
        return start == b"PK\x03\x04"  # else: an old format that happens to end like one
    if start == b"PK\x03\x04":
        raise CheckpointError(f"{path!r} is damaged: it begins like a checkpoint, but its end is missing.")
    return False


def _byte_order(file: Any) -> str:
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        folder = archive.infolist()[0].filename.partition("/")[0] if archive.filelist else ""
        try:
            return archive.read(f"{folder}/byteorder").decode()
        except KeyError:
            return "little"  # files older than the entry


def find_reader(fd: int, windows: list[Tensor], path: str) -> FileReader | None:
    """A reader for the file, if the system tells where in memory it is mapped."""
    spans = [(storage.data_ptr(), storage.nbytes()) for storage in (tensor.untyped_storage() for tensor in windows)]
    spans = [span for span in spans if span[1]]
    if not spans or not hasattr(os, "preadv"):
        return None
    start = _start_of_mapping(spans[0][0], os.fstat(fd).st_ino)
    if start is None:
        return None
    reader = FileReader(fd, start, path)
    if all(reader.covers(*span) for span in spans):
        return reader
    reader.close()
    return None


def _start_of_mapping(address: int, inode: int) -> int | None:
    """The address at which byte 0 of the file with this inode is mapped, if ``address`` lies in such a mapping."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as table:
            lines = table.read().splitlines()
    except OSError:  # not Linux, or hidden
        return None
    for line in lines:
        span, _, offset, _, node, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return first - int(offset, 16) if int(node) == inode else None
    return None
