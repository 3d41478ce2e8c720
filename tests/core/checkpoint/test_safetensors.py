"""Weights in the safetensors format: written as its own library reads them, read without a second copy."""

import sys

import fsspec
import pytest
import torch

from fabric_core import Fabric
from fabric_core.checkpoint.conversion.streams import StreamedTensor, in_pieces, streamed
from fabric_core.checkpoint.safetensors_io import load_safetensors, open_safetensors, write_safetensors
from fabric_core.checkpoint.torch_io import TorchCheckpointIO
from fabric_core.errors import CheckpointError, InvalidArgumentError, UnsupportedError, UsageError

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

DTYPES = ["float32", "float64", "float16", "bfloat16", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)
        self.head.weight = self.embed.weight


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


@pytest.fixture
def model():
    return Tied()


def write(path, state):
    streams = {}
    write_safetensors(path, {k: streams.setdefault(v.data_ptr() or k, streamed(v)) for k, v in state.items()})


def test_the_library_reads_every_dtype(path):
    tensors = {dtype: torch.arange(6).view(2, 3).to(getattr(torch, dtype)) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "strided": torch.arange(6).view(2, 3).t()}
    write(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].tolist() == tensor.tolist()


def test_the_file_is_the_one_that_the_library_writes(path, tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.ones(5, dtype=torch.uint8), "c": torch.ones(2, dtype=torch.float64)}
    write(path, tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_of_tied_tensors_one_is_written_and_the_other_noted(path, model):
    write(path, model.state_dict())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"embed.weight", "head.bias"}
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    other = Tied()
    load_model(other, path)
    assert torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize("make", [Tied, lambda: torch.nn.ModuleDict(dict(Tied().named_children()))])
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_load_raw_fills_a_module_with_its_ties(path, model, make, writer):
    write(path, model.state_dict()) if writer == "ours" else save_model(model, str(path))
    fabric = Fabric(accelerator="cpu", devices=1)
    target = fabric.setup(make())
    memory = target.head.weight.data_ptr()
    fabric.load_raw(path, target)
    assert target.head.weight.data_ptr() == memory
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())


def test_load_raw_lists_all_keys_that_differ(path, model):
    write(path, {"embed.weight": model.embed.weight, "more": torch.ones(1)})
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(KeyError, match=r"head\.bias.*more|more.*head\.bias"):
        fabric.load_raw(path, model)


def test_opening_reads_no_tensor_into_memory(path):
    write(path, {"w": torch.ones(1000)})
    opened = open_safetensors(str(path))
    assert opened.is_window(opened.content["w"])
    opened.own(opened.content)
    assert not opened.is_window(opened.content["w"])
    path.unlink()
    assert opened.content["w"].sum() == 1000
    opened.close()


def test_loading_gives_memory_of_its_own_on_the_device_asked_for(path, model):
    write(path, model.state_dict())
    loaded = TorchCheckpointIO().load_checkpoint(path)
    path.write_bytes(b"")
    assert torch.equal(loaded["head.bias"], model.head.bias)
    assert loaded["head.weight"] is loaded["embed.weight"]


@pytest.mark.parametrize("location", ["meta", torch.device("meta"), {"cpu": "meta"}])
def test_map_location_is_understood(path, location):
    write(path, {"w": torch.ones(2)})
    assert TorchCheckpointIO().load_checkpoint(path, map_location=location)["w"].is_meta
    assert load_safetensors(path, lambda storage, _: storage)["w"].tolist() == [1, 1]
    assert load_safetensors(path, lambda storage, _: None)["w"].tolist() == [1, 1]


def test_a_file_in_a_store_is_written_and_read():
    write("memory://weights/w.safetensors", {"w": torch.arange(3)})
    with fsspec.open("memory://weights/w.safetensors") as file:
        assert file.read(9)[8:] == b"{"
    assert TorchCheckpointIO().load_checkpoint("memory://weights/w.safetensors")["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("call", ["load_checkpoint", "open_checkpoint"])
@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_cut_file_is_damaged_and_named(path, call, kept):
    write(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*may be damaged"):
        getattr(TorchCheckpointIO(), call)(path).__enter__()


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        TorchCheckpointIO().load_checkpoint(path)


def test_a_missing_library_is_named_with_what_to_type(path, monkeypatch):
    write(path, {"w": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match=r"pip install 'fabric-core\[safetensors\]'"):
        TorchCheckpointIO().load_checkpoint(path)


def test_what_the_format_cannot_hold_is_refused_and_nothing_written(path, tmp_path):
    with pytest.raises(UnsupportedError, match=r"'w' is of torch\.complex128"):
        write(path, {"w": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="cannot be called '__metadata__'"):
        write(path, {"__metadata__": torch.ones(1)})
    with pytest.raises(CheckpointError, match="A tensor of 8 bytes brought 4"):
        write_safetensors(path, {"w": StreamedTensor(torch.Size([2]), torch.float32, lambda: in_pieces(torch.ones(1)))})
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_several_objects_is_not_saved_under_such_a_name(path):
    with pytest.raises(InvalidArgumentError, match="fabric checkpoint convert"):
        TorchCheckpointIO().save_checkpoint({"model": {}}, path)
    assert not path.exists()


def test_a_tensor_called_as_the_one_known_entry_of_the_metadata_is_no_tie(path):
    write(path, {"pt": torch.ones(1), "w": torch.ones(1)})
    assert set(load_safetensors(path)) == {"pt", "w"}
