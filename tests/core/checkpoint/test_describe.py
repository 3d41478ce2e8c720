"""What a description says belongs to one checkpoint."""

from contextlib import contextmanager

import pytest
import torch

from fabric_core.checkpoint.conversion import describe as module
from fabric_core.checkpoint.conversion.describe import describe
from fabric_core.checkpoint.sharded import ranks_of, write_sharded
from fabric_core.errors import CheckpointError


def test_two_checkpoints_are_never_mixed(tmp_path, monkeypatch):
    def save(name):
        write_sharded(tmp_path / "ck", {"model": {name: torch.ones(2)}}, {name: 1}, ranks_of())

    open_sharded = module.open_sharded

    @contextmanager
    def replaced_once_open(path):
        with open_sharded(path) as source:
            save("after")
            yield source

    save("before")
    with monkeypatch.context() as patched:
        patched.setattr(module, "open_sharded", replaced_once_open)
        with pytest.raises(CheckpointError, match="another save has replaced"):
            describe(tmp_path / "ck")
    found = describe(tmp_path / "ck")
    assert found.extras == {"after": "int"}
    assert [row.name for row in found.rows] == ["model.after"]
