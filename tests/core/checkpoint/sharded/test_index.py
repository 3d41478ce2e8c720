"""``.metadata`` of any torch is understood, and nothing in it runs."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fabric_core.checkpoint.sharded.index import Place, StoredChunk, TensorInfo, read_index
from fabric_core.errors import CheckpointError, UnsafeCheckpointError


def metadata(file="__0_0.distcp", **kwargs):
    chunk = ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([1, 3]))
    tensors = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2, 3]), [chunk])
    return Metadata(
        {"model.w": tensors, "lr": BytesStorageMetadata()},
        planner_data={"model.w": ("model", "w"), "lr": ("lr",)},
        storage_data={
            MetadataIndex("model.w", torch.Size([1, 0]), 0): _StorageInfo(file, 10, 20),
            MetadataIndex("lr"): _StorageInfo(file, 0, 10),
        },
        **kwargs,
    )


class Opens:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_all_that_it_says_is_there():
    index = read_index(pickle.dumps(metadata()), "x")
    assert index.tensors == {"model.w": TensorInfo(torch.Size([2, 3]), torch.bfloat16)}
    assert index.chunks == {"model.w": [StoredChunk((1, 0), (1, 3), Place("__0_0.distcp", 10, 20))]}
    assert index.objects == {"lr": Place("__0_0.distcp", 0, 10)}
    assert index.places == {"model.w": ("model", "w"), "lr": ("lr",)}


def test_paths_of_the_machine_that_wrote_it_do_no_harm(tmp_path):
    found = read_index(pickle.dumps(metadata(storage_meta=StorageMeta(checkpoint_id=tmp_path))), "x")
    assert list(found.tensors) == ["model.w"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol):
    assert read_index(pickle.dumps(metadata(), protocol), "x").tensors


def test_fields_that_another_torch_has_or_lacks_do_not_matter(monkeypatch):
    state = TensorProperties(torch.float16).__getstate__()
    for other in (state[:5], (*state[:5], (3, 1)), (*state[:5], None, "and more")):
        monkeypatch.setattr(TensorProperties, "__getstate__", lambda self, other=other: other)
        content = pickle.dumps(metadata())
        assert read_index(content, "x").tensors["model.w"].dtype == torch.float16


def test_without_a_record_of_nesting_the_key_is_the_only_step():
    flat = metadata()
    flat.planner_data = None
    assert read_index(pickle.dumps(flat), "x").places == {"model.w": ("model.w",), "lr": ("lr",)}


@pytest.mark.parametrize("where", ["planner_data", "storage_meta", "storage_data", "state_dict_metadata"])
def test_code_is_refused_by_name_and_does_not_run(where, tmp_path):
    bad = metadata()
    setattr(bad, where, Opens(str(tmp_path / "made")))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        read_index(pickle.dumps(bad), "the file")
    assert not (tmp_path / "made").exists()


def test_modules_that_torch_loads_on_demand_are_not_loaded():
    code = """
import io, sys, torch
from fabric_core.checkpoint.sharded import index, stored
name = next(name for name in torch._lazy_modules if f"torch.{name}" not in sys.modules)
content = f"ctorch\\n{name}\\n.".encode()
for load in (lambda: index.read_index(content, "x"), lambda: stored._Unpickler(io.BytesIO(content)).load()):
    try:
        load()
    except Exception as error:
        print(type(error).__name__)
    assert f"torch.{name}" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.split() == ["UnsafeCheckpointError", "_NotPlainError"], done.stderr


def test_code_runs_for_those_who_ask_for_it(tmp_path):
    bad = metadata(storage_meta=Opens(str(tmp_path / "made")))
    read_index(pickle.dumps(bad), "x", safe=False)
    assert (tmp_path / "made").exists()


def test_the_classes_that_stand_in_cannot_be_changed_from_the_file():
    # GLOBAL Metadata, then BUILD with (None, {"__setstate__": ...}) would set an attribute of the class itself.
    attack = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(V__setstate__\nVx\ndtb."
    with pytest.raises(CheckpointError, match="damaged"):
        read_index(attack, "x")
    assert read_index(pickle.dumps(metadata()), "x").tensors


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/__0_0.distcp", "a/../../b", "", "C:\\x", "..\\x"])
def test_files_outside_of_the_folder_are_refused(file):
    with pytest.raises(CheckpointError, match="outside"):
        read_index(pickle.dumps(metadata(file)), "x")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(3), pickle.dumps(metadata())[:-40]])
def test_damage_is_an_error_that_names_the_file(content):
    with pytest.raises(CheckpointError, match=r"'the file' cannot be read, it may be damaged"):
        read_index(content, "the file")


def test_a_piece_that_is_nowhere_is_damage():
    lost = metadata()
    lost.storage_data = {}
    with pytest.raises(CheckpointError, match="damaged"):
        read_index(pickle.dumps(lost), "x")


def test_stream_transforms_are_refused_with_what_to_use():
    changed = metadata()
    for info in changed.storage_data.values():
        info.transform_descriptors = ["stream.zstd/1"]
    with pytest.raises(CheckpointError, match="zstd"):
        read_index(pickle.dumps(changed), "x")


class AsOlderPythons:
    """Pickles a member of an enumeration as Python 3.11.0 to 3.11.3 do: through ``getattr``."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_as_some_pythons_write_them_are_read(monkeypatch):
    state = list(TensorProperties(torch.float16).__getstate__())
    state[3] = AsOlderPythons(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: tuple(state))
    assert read_index(pickle.dumps(metadata()), "x").tensors["model.w"].dtype is torch.float16


def test_attributes_of_anything_else_cannot_be_reached():
    for owner in (torch.Size, MetadataIndex, torch.float32):
        stranger = AsOlderPythons(owner, "__class__")
        with pytest.raises(CheckpointError, match="an attribute of"):
            read_index(pickle.dumps(metadata(storage_meta=stranger)), "x")
