"""Who writes what: DCP's planner decides, so that whatever reads DCP's checkpoints reads these."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what DCP's reader expects to find in the pickle
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from fabric_core.checkpoint.sharded.archive import write_tensor
from fabric_core.checkpoint.sharded.boxes import box_of, is_dtensor
from fabric_core.checkpoint.sharded.index import Place
from fabric_core.checkpoint.sharded.manifest import FileRecord
from fabric_core.checkpoint.sharded.summed import SummedFile

DCP_VERSION = "1.0.0"
"""The layout of files that DCP's metadata names since torch 2.8; the earlier ones are the same and have no name."""


class Planner:
    """One save: the plan of this process, that of all, and what there is to write.

    Every rank makes one; ``local`` comes first, ``together`` on rank 0, ``write`` last.
    """

    def __init__(self, tensors: Mapping[str, Any], *, is_first: bool) -> None:
        self._planner = DefaultSavePlanner()
        self._planner.set_up_planner(dict(tensors), None, is_first)

    def local(self) -> SavePlan:
        """What this process has."""
        plan = self._planner.create_local_plan()
        return replace(plan, items=[found for item in plan.items for found in self._corrected(item)])

    def _corrected(self, item: WriteItem) -> Iterator[WriteItem]:
        """The item with its place in the whole tensor as we find it; none if it holds nothing of a tensor that does.

        Older torch errs where cuts are uneven, and what is empty could be taken for a piece at the same place.
        """
        value = self._planner.state_dict[item.index.fqn]
        if item.tensor_data is None or not is_dtensor(value) or value.numel() == 0:
            yield item
        elif 0 not in (box := box_of(value)).sizes:
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            index = MetadataIndex(item.index.fqn, chunk.offsets)
            yield replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=chunk))

    def together(self, plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each process writes, so that everything is written once; and the description of all tensors."""
        return self._planner.create_global_plan(plans)

    def write(
        self, plan: SavePlan, create: Callable[[str], SummedFile], name: str, files: dict[str, FileRecord]
    ) -> dict[MetadataIndex, Place]:
        """Write what the plan says to the file ``name``, and list it in ``files``; where in it each piece is.

        No file is made if there is nothing to write.
        """
        plan = self._planner.finish_plan(plan)
        if not plan.items:
            return {}
        places = {}
        # Values first, then tensors from small to large: whatever cannot be pickled shows early.
        items = sorted(plan.items, key=lambda item: item.tensor_storage_size() or 0)
        with create(name) as file:
            for item in items:
                start = file.tell()
                data: Any = self._planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    write_tensor(data, file)
                places[item.index] = Place(name, start, file.tell() - start)
        files[name] = file.record()
        return places


def dump_metadata(metadata: Metadata, places: Mapping[MetadataIndex, Place]) -> bytes:
    """The content of ``.metadata``. It holds no path, and torch older than the one that runs can read it."""
    metadata.storage_data = {
        index: _StorageInfo(place.file, place.start, place.length) for index, place in places.items()
    }
    metadata.storage_meta = None
    if hasattr(metadata, "version"):
        metadata.version = DCP_VERSION
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(metadata)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Leaves out what torch 2.14 and later say of strides, which is of no use to readers, and stops older ones."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is TensorProperties:
            return copyreg.__newobj__, (TensorProperties,), obj.__getstate__()[:5]  # type: ignore[attr-defined]
        return NotImplemented
