"""One tensor in a file is what torch.load reads, with the checksum of every byte."""

import io
import random
import zipfile
import zlib

import pytest
import torch

from fabric_core.checkpoint.sharded.archive import write_tensor
from fabric_core.checkpoint.sharded.folder import LocalFolder
from fabric_core.checkpoint.sharded.index import Place
from fabric_core.checkpoint.sharded.stored import Box, read_box
from fabric_core.checkpoint.sharded.summed import SummedFile, joined

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.bool),
]
WHOLE = torch.arange(24).view(2, 3, 4)
VIEWS = {
    "whole": WHOLE,
    "turned": WHOLE.transpose(0, 2),
    "with gaps": WHOLE[:, 1:, ::2],
    "from the middle": WHOLE[1],
    "one number": WHOLE[1, 2, 3],
    "nothing": WHOLE[:0],
    "repeated": torch.arange(3).expand(4, 3),
    "large": torch.arange(300_000).view(300, 1000),
    "large and turned": torch.arange(300_000).view(300, 1000).t(),
}


class Bytes(io.BytesIO):
    def close(self):
        self.content = self.getvalue()
        super().close()


def written(*tensors):
    """What is in the file, its record, and where the last tensor begins."""
    sink = Bytes()
    with SummedFile(sink) as file:
        for tensor in tensors:
            start = file.tell()
            write_tensor(tensor, file)
    return sink.content, file.record(), start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(dtype):
    tensor = torch.randint(0, 2, (5, 3)).to(dtype)
    loaded = torch.load(io.BytesIO(written(tensor)[0]), weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", VIEWS)
def test_every_layout_comes_back_through_torch_and_through_us(name, tmp_path):
    tensor = VIEWS[name]
    content, _, start = written(torch.ones(3), tensor)
    assert torch.equal(torch.load(io.BytesIO(content[start:]), weights_only=True), tensor)
    (tmp_path / "x").write_bytes(content)
    destination = torch.empty(tensor.shape, dtype=tensor.dtype)
    place = Place("x", start, len(content) - start)
    if tensor.numel():
        read_box(LocalFolder(str(tmp_path)), place, Box((0,) * tensor.dim(), tuple(tensor.shape)), destination)
    assert torch.equal(destination, tensor)


def test_a_view_does_not_bring_what_it_does_not_show():
    assert len(written(torch.zeros(100_000)[:3])[0]) < 2000


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_what_is_no_plain_tensor_is_written_too():
    sparse = torch.eye(3).to_sparse()
    loaded = torch.load(io.BytesIO(written(sparse)[0]), weights_only=True)
    assert torch.equal(loaded.to_dense(), sparse.to_dense())


def test_it_is_a_sound_archive_with_its_data_aligned():
    content, _, _ = written(torch.arange(1000.0))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert content.index(torch.arange(1000.0).numpy().tobytes()) % 64 == 0


def test_the_checksum_is_that_of_all_bytes():
    content, record, _ = written(torch.rand(70_000), torch.rand(3), torch.rand(400, 500).t(), torch.tensor(1))
    assert record.size == len(content)
    assert record.digest == f"{zlib.crc32(content):08x}"


def test_checksums_of_pieces_give_that_of_the_whole():
    source = random.Random(0)
    for _ in range(200):
        first, second = (source.randbytes(source.randrange(300)) for _ in range(2))
        assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


class Full(Bytes):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_the_error_that_shows():
    with pytest.raises(OSError, match="No space left"), SummedFile(Full()) as file:
        torch.save({"w": torch.zeros(100_000)}, file)
