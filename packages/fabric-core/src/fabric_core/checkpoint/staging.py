"""Copying what is to be saved to host memory, so that the program may go on and change it.

The copy is what saving and loading would give, without the file: the tree is pickled and unpickled in memory, and only
the tensors' bytes take another way. Each storage is copied once, to a buffer that the next copy of an equally large
storage uses again, so tensors that share memory still do, and from the second time on no memory is asked for.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import Counter
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, UntypedStorage

from fabric_core.accelerator_of_torch import accelerator_of_torch
from fabric_core.checkpoint.lazy import is_plain_tensor
from fabric_core.errors import CheckpointError

_Kind: TypeAlias = "tuple[int, bool]"  # bytes, page-locked
_COMPRESSED: Final = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


class HostBuffers:
    """Host memory for one copy of a state, kept from one time to the next. Each copy overwrites the one before."""

    def __init__(self) -> None:
        self._kept: dict[_Kind, list[UntypedStorage]] = {}
        self._used: Counter[_Kind] = Counter()

    def rewind(self) -> None:
        """Begin a new copy."""
        self._used.clear()

    def take(self, size: int, pinned: bool) -> UntypedStorage:
        """A buffer of ``size`` bytes that this copy does not use yet, page-locked if that is possible and wanted."""
        kind = (size, pinned)
        kept, number = self._kept.setdefault(kind, []), self._used[kind]
        if number == len(kept):
            kept.append(_new_buffer(size, pinned))
        self._used[kind] += 1
        return kept[number]

    def drop_unused(self) -> None:
        """Free what this copy did not use."""
        self._kept = {kind: self._kept[kind][:number] for kind, number in self._used.items()}


def stage(tree: Any, buffers: HostBuffers) -> Any:
    """A copy of ``tree`` that no later change reaches, with all tensors in host memory.

    Tensors, parameters and strides, what shares memory, and what is one object in several places stay so. A DTensor
    becomes one around a copy of this rank's part, of the same global shape, mesh and placements. The copy is complete
    when this returns; it holds until ``buffers`` is used again. No collectives.

    Raises:
        CheckpointError: something in ``tree`` cannot be pickled.
    """
    buffers.rewind()
    file = io.BytesIO()
    copier = _Copier(file, buffers)
    try:
        with torch.no_grad():
            copier.dump(tree)
            copier.wait()
            file.seek(0)
            copied = _Assembler(file, copier.parts).load()
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"The state cannot be copied, so it cannot be written in the background: {error}. Store plain values and "
            "state dicts."
        ) from error
    buffers.drop_unused()
    return copied


class _Kept:
    """Something that the copy refers to as it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _part(number: int) -> Any:
    """Stands in the pickled bytes for a part that is not in them."""
    raise NotImplementedError(number)


class _Copier(pickle.Pickler):
    """Pickles all but tensors, which it copies; the copies are ``parts``, and the bytes refer to them by number."""

    def __init__(self, file: io.BytesIO, buffers: HostBuffers) -> None:
        super().__init__(file, protocol=5)
        self.parts: list[Any] = []
        self._buffers = buffers
        self._copies: dict[int, UntypedStorage] = {}
        self._sources: list[UntypedStorage] = []  # kept, so that no address is used twice
        self._accelerator: torch.device | None = None
        # There are no DTensors in a program that has not imported them.
        self._dtensor: type = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", _Kept)

    # Called for everything but numbers, text and plain containers.
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            if is_plain_tensor(obj) and obj.device.type != "meta":
                return self._refer(self._copy_of(obj))
            if isinstance(obj, self._dtensor):
                return self._reduce_dtensor(obj)
            return _reduce_sparse(obj) if obj.is_sparse or obj.layout in _COMPRESSED else NotImplemented
        # Of other tensors, what torch pickles are their storages.
        if isinstance(obj, torch.TypedStorage):
            copy = self._storage(obj._untyped_storage)
            return self._refer(torch.TypedStorage(wrap_storage=copy, dtype=obj.dtype, _internal=True))
        if isinstance(obj, UntypedStorage):
            return self._refer(self._storage(obj))
        return self._refer(obj.value) if type(obj) is _Kept else NotImplemented

    def wait(self) -> None:
        """Return once the copies from other devices are there."""
        if self._accelerator is not None:
            torch.accelerator.synchronize(self._accelerator)

    def _refer(self, part: Any) -> tuple[Any, tuple[int]]:
        self.parts.append(part)
        return _part, (len(self.parts) - 1,)

    def _copy_of(self, tensor: Tensor) -> Tensor:
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(self._storage(tensor.untyped_storage()), tensor.storage_offset(), tensor.size(), tensor.stride())
        if type(tensor) is torch.nn.Parameter:
            return torch.nn.Parameter(copy, tensor.requires_grad)
        return copy.requires_grad_() if tensor.requires_grad else copy

    def _reduce_dtensor(self, tensor: Any) -> tuple[Any, ...]:
        """Around a copy of the local part, with torch's own way to take apart and rebuild tensors made of tensors."""
        names, context = tensor.__tensor_flatten__()
        inner = {name: _Kept(getattr(tensor, name)) for name in names} | {"_local_tensor": tensor.to_local()}
        kept = (_Kept(context), _Kept(tensor.size()), _Kept(tensor.stride()))
        return type(tensor).__tensor_unflatten__, (inner, *kept)

    def _storage(self, source: UntypedStorage) -> UntypedStorage:
        key = source._cdata
        if key not in self._copies:
            self._copies[key] = self._copied(source)
            self._sources.append(source)
        return self._copies[key]

    def _copied(self, source: UntypedStorage) -> UntypedStorage:
        size, remote = source.nbytes(), source.device.type != "cpu"
        if remote and self._accelerator is None:
            self._accelerator = accelerator_of_torch()
        pinned = remote and self._accelerator is not None and self._accelerator.type == source.device.type
        buffer = self._buffers.take(size, pinned)
        if size:
            buffer.copy_(source, non_blocking=pinned)
        return buffer


def _reduce_sparse(tensor: Tensor) -> tuple[Any, ...]:
    # What torch unpickles sparse tensors with remembers each of them until the next torch.load.
    rebuild, *rest = tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return (_sparse if rebuild is torch._utils._rebuild_sparse_tensor else rebuild, *rest)


def _sparse(layout: torch.layout, parts: tuple[Any, ...]) -> Tensor:
    if layout is torch.sparse_coo:
        indices, values, size, coalesced = parts
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=False)
    outer, inner, values, size = parts
    return torch.sparse_compressed_tensor(outer, inner, values, size, layout=layout, check_invariants=False)


class _Assembler(pickle.Unpickler):
    """Unpickles the copy, with the parts in their places."""

    def __init__(self, file: io.BytesIO, parts: list[Any]) -> None:
        super().__init__(file)
        self._parts = parts

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _part.__name__):
            return self._parts.__getitem__
        return super().find_class(module, name)


def _new_buffer(size: int, pinned: bool) -> UntypedStorage:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).untyped_storage()
        except RuntimeError:  # not all devices know it, and the system limits how much there may be
            pass
    return torch.empty(size, dtype=torch.uint8).untyped_storage()
