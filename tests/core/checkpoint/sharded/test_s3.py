"""Sharded checkpoints on a server that speaks S3."""

import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from fabric_core.checkpoint.sharded import is_sharded, open_sharded, verify, write_sharded
from fabric_core.checkpoint.sharded.ranks import ranks_of

BUCKET = "bucket"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path_factory.mktemp("moto") / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def connect(endpoint):
    """What a program on the cloud finds in its environment. The file system that answers for ``s3://`` from now on."""
    import os

    import s3fs

    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    s3fs.S3FileSystem.clear_instance_cache()
    return s3fs.S3FileSystem()


def save(url, value, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    w = torch.full((5, 3), value)
    if ranks.size > 1:
        w = distribute_tensor(w, init_device_mesh("cpu", (ranks.size,)), [Shard(0)])
    write_sharded(url, {"w": w, "n": 3}, {"value": value}, ranks)


def value(url):
    with open_sharded(url) as checkpoint:
        w = torch.empty(5, 3)
        checkpoint.read({"w": w})
        assert checkpoint.extras == {"value": w[0, 0].item()}
        assert (w == w[0, 0]).all()
        return w[0, 0].item()


def save_together(endpoint, url):
    connect(endpoint)
    found = []
    for round in (1.0, 2.0):
        save(url, round, ranks_of())
        found.append(value(url))
    return found


def fail_together(endpoint, url):
    connect(endpoint)
    ranks = ranks_of()
    tensors = {"w": torch.ones(3)} | ({"bad": lambda: None} if ranks.rank == 1 else {"good": 1})
    with pytest.raises(Exception, match=r"cannot be written|rank 1 failed"):
        write_sharded(url, tensors, {}, ranks)
    return value(url)


def test_one_process_saves_and_loads(endpoint):
    filesystem = connect(endpoint)
    filesystem.makedirs(BUCKET, exist_ok=True)
    url = f"s3://{BUCKET}/runs/one/ck"
    assert not is_sharded(url)
    for round in (1.0, 2.0):
        save(url, round, ranks_of())
        assert is_sharded(url)
        assert value(url) == round
        assert verify(url) == []
    filesystem.invalidate_cache()
    assert len(filesystem.find(url)) == 6


def test_a_single_object_of_that_name_is_replaced(endpoint):
    filesystem = connect(endpoint)
    filesystem.makedirs(BUCKET, exist_ok=True)
    url = f"s3://{BUCKET}/runs/file.ckpt"
    filesystem.pipe_file(url, b"a single file")
    save(url, 1.0, ranks_of())
    assert value(url) == 1.0
    filesystem.invalidate_cache()
    assert all(name != f"{BUCKET}/runs/file.ckpt" for name in filesystem.find(url))


def test_two_processes_save_one_checkpoint(endpoint, workers):
    connect(endpoint).makedirs(BUCKET, exist_ok=True)
    url = f"s3://{BUCKET}/runs/two/ck"
    assert workers(2).run(save_together, endpoint, url, timeout=120) == [[1.0, 2.0]] * 2
    assert workers(2).run(fail_together, endpoint, url, timeout=120) == [2.0, 2.0]
    assert value(url) == 2.0
    assert verify(url) == []
