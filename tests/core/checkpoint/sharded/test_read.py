"""Reading what is wanted, from what Fabric or DCP itself wrote. Here by one process."""

import os
import pickle
import shutil
import warnings

import pytest
import torch

from fabric_core.checkpoint.sharded import TensorInfo, is_sharded, open_sharded, ranks_of, verify, write_sharded
from fabric_core.checkpoint.sharded.folder import LocalFolder
from fabric_core.checkpoint.sharded.read import open_folder
from fabric_core.errors import CheckpointError, CheckpointKeyError, UnsafeCheckpointError, UsageError

STATE = {
    "model": {"layer.weight": torch.arange(12.0).view(3, 4), "layer.bias": torch.arange(3).to(torch.bfloat16)},
    "optimizer": {
        "state": {"layer.weight": {"exp_avg": torch.arange(12.0).view(4, 3).t(), "step": torch.tensor(7.0)}},
        "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": ["layer.weight", "layer.bias"]}],
    },
}


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_with_dcp(state, path, **kwargs):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, **kwargs)


def load_with_dcp(state, path):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path)


def read_all(path, **kwargs):
    with open_sharded(path, **kwargs) as checkpoint:
        tensors = {key: torch.empty(info.shape, dtype=info.dtype) for key, info in checkpoint.tensors.items()}
        checkpoint.read(tensors)
        return tensors | {key: checkpoint.read_object(key) for key in checkpoint.objects}


@pytest.fixture(params=["fabric", "dcp"])
def path(request, tmp_path):
    folder = tmp_path / "ck"
    if request.param == "fabric":
        write_sharded(folder, STATE, {"epoch": 3}, ranks_of())
    else:
        save_with_dcp(STATE, folder)
        torch.save({"epoch": 3}, folder / "meta.pt")
    return folder


def test_extras_of_a_replaced_checkpoint_are_gone_and_not_empty(tmp_path):
    write_sharded(tmp_path / "ck", STATE, {"epoch": 3}, ranks_of())
    with open_sharded(tmp_path / "ck") as checkpoint:
        write_sharded(tmp_path / "ck", STATE, {"epoch": 4}, ranks_of())
        with pytest.raises(CheckpointError, match="another save has replaced"):
            _ = checkpoint.extras


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files there")
def test_a_folder_that_cannot_be_listed_is_closed_again(tmp_path, monkeypatch):
    def broken(self):
        raise OSError("no connection")

    write_sharded(tmp_path / "ck", STATE, {}, ranks_of())
    monkeypatch.setattr(LocalFolder, "sizes", broken)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no connection") as error, open_folder(tmp_path / "ck"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before, error


def test_what_is_there_is_told_without_reading_it(path):
    assert is_sharded(path)
    with open_sharded(path) as checkpoint:
        assert checkpoint.tensors["model.layer.weight"] == TensorInfo(torch.Size([3, 4]), torch.float32)
        assert checkpoint.tensors["model.layer.bias"].dtype == torch.bfloat16
        assert "optimizer.param_groups.0.betas" in checkpoint.objects
        assert checkpoint.places["model.layer.weight"] == ("model", "layer.weight")
        assert checkpoint.places["optimizer.param_groups.0.lr"] == ("optimizer", "param_groups", 0, "lr")
        assert checkpoint.extras == {"epoch": 3}


def test_everything_comes_back(path):
    found = read_all(path)
    assert torch.equal(found["model.layer.weight"], STATE["model"]["layer.weight"])
    assert torch.equal(found["model.layer.bias"], STATE["model"]["layer.bias"])
    assert torch.equal(
        found["optimizer.state.layer.weight.exp_avg"], STATE["optimizer"]["state"]["layer.weight"]["exp_avg"]
    )
    assert found["optimizer.state.layer.weight.step"] == 7
    assert found["optimizer.param_groups.0.betas"] == (0.9, 0.99)


def test_other_dtypes_and_layouts_are_converted(path):
    wanted = {
        "model.layer.weight": torch.nn.Parameter(torch.empty(4, 3, dtype=torch.float16).t()),
        "model.layer.bias": torch.empty(3, dtype=torch.float64),
    }
    with open_sharded(path) as checkpoint:
        checkpoint.read(wanted)
    assert torch.equal(wanted["model.layer.weight"], STATE["model"]["layer.weight"].half())
    assert torch.equal(wanted["model.layer.bias"], STATE["model"]["layer.bias"].double())


def test_everything_that_does_not_fit_is_listed_and_nothing_is_read(path):
    right = torch.zeros(3, 4)
    with open_sharded(path) as checkpoint:
        with pytest.raises(CheckpointKeyError, match=r"no tensors 'a', 'b'; model.layer.bias has shape \(3,\) "):
            checkpoint.read({"a": right, "b": right, "model.layer.bias": right, "model.layer.weight": right})
        with pytest.raises(CheckpointError, match=r"bias has shape .*weight has shape \(3, 4\) there and \(4,\) here"):
            checkpoint.read({"model.layer.bias": right, "model.layer.weight": torch.zeros(4)})
        with pytest.raises(CheckpointKeyError, match=r"no tensors 'optimizer.param_groups.0.lr'"):
            checkpoint.read({"optimizer.param_groups.0.lr": torch.zeros(())})
        with pytest.raises(CheckpointKeyError, match=r"no python value under 'model.layer.weight'"):
            checkpoint.read_object("model.layer.weight")
        with pytest.raises(UsageError, match=r"meta device.*model.layer.weight"):
            checkpoint.read({"model.layer.weight": torch.empty(3, 4, device="meta")})
    assert not right.any()


def test_a_checkpoint_of_a_flat_dict_is_read(tmp_path):
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    state = {"layer.weight": torch.ones(2), "n": 3}
    save_with_dcp(state, tmp_path / "ck", planner=DefaultSavePlanner(flatten_state_dict=False))
    with open_sharded(tmp_path / "ck") as checkpoint:
        assert checkpoint.places == {"layer.weight": ("layer.weight",), "n": ("n",)}
        assert checkpoint.extras == {}
    assert read_all(tmp_path / "ck")["n"] == 3


def test_dcp_reads_what_fabric_wrote(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    write_sharded(tmp_path / "ck", STATE, {}, ranks_of())
    target = {"model": {"layer.weight": torch.zeros(3, 4)}, "optimizer": {"param_groups": [{"lr": 0.0}]}}
    load_with_dcp(target, tmp_path / "ck")
    assert torch.equal(target["model"]["layer.weight"], STATE["model"]["layer.weight"])
    assert target["optimizer"]["param_groups"][0]["lr"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(tmp_path / "ck", tmp_path / "ck.pt")
    assert torch.load(tmp_path / "ck.pt")["optimizer"]["param_groups"] == STATE["optimizer"]["param_groups"]


def test_large_tensors_are_read_in_pieces_and_in_parallel(tmp_path):
    state = {"a": torch.arange(6_000_000).view(3000, 2000), "b": torch.arange(6_000_000.0).view(2000, 3000).t()}
    write_sharded(tmp_path / "ck", state, {}, ranks_of())
    turned = torch.empty(2000, 3000, dtype=torch.int32).t()
    with open_sharded(tmp_path / "ck") as checkpoint:
        checkpoint.read({"a": turned})
        b = torch.empty(3000, 2000)
        checkpoint.read({"b": b})
    assert torch.equal(turned, state["a"].int())
    assert torch.equal(b, state["b"])


def test_values_that_run_code_are_refused_by_name(tmp_path):
    made = tmp_path / "made"
    save_with_dcp({"w": torch.ones(1), "bad": Command(made)}, tmp_path / "ck")
    with open_sharded(tmp_path / "ck") as checkpoint:
        checkpoint.read({"w": torch.zeros(1)})
        with pytest.raises(UnsafeCheckpointError, match=r"'bad'.*posix\.mkdir"):
            checkpoint.read_object("bad")
    assert not made.exists()
    with open_sharded(tmp_path / "ck", weights_only=False) as checkpoint:
        checkpoint.read_object("bad")
    assert made.exists()


def test_extras_that_run_code_are_refused_by_name(tmp_path):
    write_sharded(tmp_path / "ck", {"w": torch.ones(1)}, {"bad": Command(tmp_path / "made")}, ranks_of())
    with open_sharded(tmp_path / "ck") as checkpoint, pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        _ = checkpoint.extras
    assert not (tmp_path / "made").exists()


def test_all_files_that_are_gone_or_cut_are_listed(tmp_path):
    write_sharded(tmp_path / "ck", STATE, {}, ranks_of())
    (tmp_path / "ck" / "meta.pt").unlink()
    os.truncate(tmp_path / "ck" / "__0_0.distcp", 100)
    damage = r"__0_0.distcp has 100 bytes, not \d+; meta.pt is missing"
    with pytest.raises(CheckpointError, match=damage), open_sharded(tmp_path / "ck"):
        pass
    assert len(verify(tmp_path / "ck")) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1, "files": []}'])
def test_a_damaged_manifest_is_an_error(content, tmp_path):
    write_sharded(tmp_path / "ck", STATE, {}, ranks_of())
    (tmp_path / "ck" / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no manifest"), open_sharded(tmp_path / "ck"):
        pass


def test_a_manifest_of_the_future_says_so(tmp_path):
    write_sharded(tmp_path / "ck", STATE, {}, ranks_of())
    manifest = tmp_path / "ck" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(CheckpointError, match="Update fabric-core"), open_sharded(tmp_path / "ck"):
        pass


def test_without_a_manifest_damage_shows_when_it_is_read(tmp_path):
    save_with_dcp(STATE, tmp_path / "ck")
    assert "nothing can be compared" in verify(tmp_path / "ck")[0]
    os.truncate(tmp_path / "ck" / "__0_0.distcp", 3000)
    with pytest.raises(CheckpointError, match="shorter than its index says"):
        read_all(tmp_path / "ck")
    (tmp_path / "ck" / "__0_0.distcp").write_bytes(bytes(100_000))
    with pytest.raises(CheckpointError, match="damaged"):
        read_all(tmp_path / "ck")


def test_a_part_that_was_never_stored_is_an_error(tmp_path):
    save_with_dcp({"w": torch.ones(4, 2)}, tmp_path / "ck")
    file = tmp_path / "ck" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["w"].size = torch.Size([5, 2])
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="w is not stored completely, 2 elements"):
        read_all(tmp_path / "ck")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_never_mixed(tmp_path):
    write_sharded(tmp_path / "ck", {"w": torch.zeros(3)}, {}, ranks_of())
    with open_sharded(tmp_path / "ck") as checkpoint:
        write_sharded(tmp_path / "ck", {"w": torch.ones(3)}, {}, ranks_of())
        with pytest.raises(CheckpointError, match="another save has replaced"):
            checkpoint.read({"w": torch.empty(3)})
    assert read_all(tmp_path / "ck")["w"].tolist() == [1, 1, 1]


def test_where_nothing_is_the_error_says_so(tmp_path):
    for name in ("absent", "empty", "file"):
        assert not is_sharded(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("absent", "empty", "file"):
        assert not is_sharded(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="sharded checkpoint"), open_sharded(tmp_path / name):
            pass


def test_a_copy_elsewhere_is_the_same_checkpoint(tmp_path):
    write_sharded(tmp_path / "ck", STATE, {}, ranks_of())
    shutil.move(tmp_path / "ck", tmp_path / "there")
    assert verify(tmp_path / "there") == []
    assert torch.equal(read_all(tmp_path / "there")["model.layer.weight"], STATE["model"]["layer.weight"])
