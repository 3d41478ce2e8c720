"""Files written tensor by tensor are files of ``torch.save``."""

import argparse
import io
import zipfile
from collections import OrderedDict

import pytest
import torch

from fabric_core.checkpoint.conversion.single_file import write_archive, write_file
from fabric_core.checkpoint.conversion.streams import StreamedTensor, in_pieces, size_of, streamed
from fabric_core.checkpoint.lazy import open_mapped
from fabric_core.errors import CheckpointError

DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "bool",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


class Stream(io.RawIOBase):
    """A store's file: what is written is written, and there is no way back."""

    def __init__(self):
        self.content = bytearray()

    def writable(self):
        return True

    def tell(self):
        return len(self.content)

    def write(self, part):
        self.content += bytes(part)
        return len(part)


def numbers(dtype):
    return torch.arange(12).view(3, 4).to(getattr(torch, dtype))


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("mmap", [False, True])
def test_every_dtype_comes_back_through_safe_loading(tmp_path, mmap):
    tensors = {dtype: numbers(dtype) for dtype in DTYPES if not dtype.startswith("complex")}
    write_file(tmp_path / "x.pt", {name: streamed(tensor) for name, tensor in tensors.items()})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_structure_is_what_torch_would_write(tmp_path, dtype):
    tree = {"a": numbers(dtype), "n": 3, "list": [numbers(dtype), (1, "x")]}
    torch.save(tree, tmp_path / "torch.pt")
    write_file(tmp_path / "ours.pt", {**tree, "a": streamed(tree["a"]), "list": [streamed(tree["list"][0]), (1, "x")]})
    with zipfile.ZipFile(tmp_path / "torch.pt") as torchs, zipfile.ZipFile(tmp_path / "ours.pt") as ours:
        for name in ("data.pkl", "data/0", "data/1", "version", "byteorder"):
            assert ours.read(f"archive/{name}") == torchs.read(f"torch/{name}")


def test_checksums_are_right_and_tensors_start_at_multiples_of_64(tmp_path):
    write_file(tmp_path / "x.pt", {str(n): streamed(torch.arange(n)) for n in range(1, 20)})
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert all(reader.get_record_offset(f"data/{n}") % 64 == 0 for n in range(19))
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None


def test_a_store_that_cannot_go_back_gets_the_same_content():
    stream = Stream()
    write_archive(stream, {"w": streamed(torch.arange(5)), "b": torch.ones(3)})
    loaded = torch.load(io.BytesIO(stream.content), weights_only=True)
    assert torch.equal(loaded["w"], torch.arange(5))
    assert torch.equal(loaded["b"], torch.ones(3))
    assert zipfile.ZipFile(io.BytesIO(stream.content)).testzip() is None


def test_ties_stay(tmp_path):
    tied, plain = streamed(torch.ones(4)), torch.arange(6)
    write_file(tmp_path / "x.pt", {"a": tied, "b": [tied], "c": plain[:3], "d": plain[3:]})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    loaded["a"][0] = 9
    loaded["c"][0] = 9
    assert loaded["b"][0][0] == 9
    assert loaded["d"].tolist() == [3, 4, 5]
    assert loaded["c"].untyped_storage().data_ptr() == loaded["d"].untyped_storage().data_ptr()


def test_tensors_of_other_kinds_and_attributes_are_kept(tmp_path):
    state = OrderedDict(w=streamed(torch.ones(2)))
    state._metadata = {"": {"version": 2}}
    tree = {"state": state, "p": torch.nn.Parameter(torch.ones(2)), "empty": streamed(torch.empty(0, 3)), "t": (1,)}
    write_file(tmp_path / "x.pt", {**tree, "sparse": torch.eye(2).to_sparse()})
    loaded = torch.load(tmp_path / "x.pt", weights_only=False)
    assert loaded["state"]._metadata == {"": {"version": 2}}
    assert isinstance(loaded["p"], torch.nn.Parameter)
    assert loaded["empty"].shape == (0, 3)
    assert loaded["t"] == (1,)
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(2))


def test_the_pieces_are_written_one_after_the_other(tmp_path):
    pieces = (torch.full((1000,), float(n)) for n in range(10))
    seen = []
    tree = {"w": StreamedTensor(torch.Size([10, 1000]), torch.float32, lambda: pieces)}
    assert size_of(tree) == 40_000
    write_file(tmp_path / "x.pt", tree, seen.append)
    assert seen == [4000] * 10
    assert torch.load(tmp_path / "x.pt")["w"][:, 0].tolist() == list(range(10))


@pytest.mark.parametrize("brought", [0, 3, 5])
def test_a_tensor_that_brings_another_number_of_values_leaves_nothing(tmp_path, brought):
    wrong = StreamedTensor(torch.Size([4]), torch.float32, lambda: in_pieces(torch.ones(brought)))
    with pytest.raises(CheckpointError, match=f"A tensor of 16 bytes brought {4 * brought}"):
        write_file(tmp_path / "x.pt", {"w": wrong})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_pickled_is_an_error_and_leaves_what_was_there(tmp_path):
    write_file(tmp_path / "x.pt", {"n": 1})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "x.pt", {"f": lambda: 0})
    assert torch.load(tmp_path / "x.pt") == {"n": 1}


def test_objects_are_stored_as_torch_would(tmp_path):
    write_file(tmp_path / "x.pt", {"args": argparse.Namespace(lr=1), "w": streamed(torch.ones(1))})
    assert torch.load(tmp_path / "x.pt", weights_only=False)["args"].lr == 1


def test_windows_on_a_file_are_copied_without_reading_them_into_memory_as_a_whole(tmp_path):
    source = {"w": torch.arange(24).view(4, 6), "t": torch.arange(24).view(4, 6).t(), "s": torch.tensor(2)}
    torch.save(source, tmp_path / "x.pt")
    opened = open_mapped(str(tmp_path / "x.pt"))
    write_file(tmp_path / "y.pt", {name: streamed(window, opened) for name, window in opened.content.items()})
    opened.close()
    loaded = torch.load(tmp_path / "y.pt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.items())


def test_another_dtype_is_made_on_the_way(tmp_path):
    write_file(tmp_path / "x.pt", {"w": streamed(torch.arange(5.0)).to(torch.bfloat16)})
    assert torch.equal(torch.load(tmp_path / "x.pt")["w"], torch.arange(5.0).bfloat16())
