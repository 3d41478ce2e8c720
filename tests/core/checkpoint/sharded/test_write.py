"""A sharded checkpoint is there completely, or what was there before still is. Here by one process."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fabric_core.checkpoint.sharded import draft, is_sharded, open_sharded, publication, ranks_of, verify, write_sharded
from fabric_core.errors import CheckpointError, UnsupportedError


def save(path, value=1.0, extras=None):
    write_sharded(
        path, {"model": {"w": torch.full((4, 3), value)}}, {"epoch": 3} if extras is None else extras, ranks_of()
    )


def value(path):
    with open_sharded(path) as checkpoint:
        w = torch.empty(4, 3)
        checkpoint.read({"model.w": w})
        return w[0, 0].item()


def names(folder):
    return sorted(os.listdir(folder))


def test_the_folder_holds_what_it_should_and_no_more(tmp_path):
    save(tmp_path / "new" / "ck")
    assert names(tmp_path / "new" / "ck") == [".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
    assert names(tmp_path / "new") == ["ck"]
    assert is_sharded(tmp_path / "new" / "ck")
    assert torch.load(tmp_path / "new" / "ck" / "meta.pt") == {"epoch": 3}


def test_saving_again_replaces_all(tmp_path):
    save(tmp_path / "ck", 1.0)
    save(tmp_path / "ck", 2.0)
    assert value(tmp_path / "ck") == 2.0
    assert names(tmp_path) == ["ck"]


def test_a_relative_path_is_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("ck/")
    save("./ck", 2.0)
    assert value("ck") == 2.0
    assert names(tmp_path) == ["ck"]


def test_an_empty_folder_is_taken_with_its_permissions(tmp_path):
    (tmp_path / "ck").mkdir(mode=0o750)
    save(tmp_path / "ck")
    save(tmp_path / "ck")
    assert stat.S_IMODE((tmp_path / "ck").stat().st_mode) == 0o750


def test_a_single_file_is_replaced(tmp_path):
    torch.save({}, tmp_path / "ck")
    save(tmp_path / "ck")
    assert value(tmp_path / "ck") == 1.0
    assert names(tmp_path) == ["ck"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "ck").symlink_to(tmp_path / "there")
    save(tmp_path / "ck", 1.0)
    save(tmp_path / "ck", 2.0)
    assert (tmp_path / "ck").is_symlink()
    assert value(tmp_path / "there") == 2.0


def test_a_folder_with_other_things_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(IsADirectoryError, match="holds other things than a checkpoint"):
        save(tmp_path / "home")
    assert names(tmp_path) == ["home"]
    assert names(tmp_path / "home") == ["thesis.tex"]


def test_what_somebody_put_beside_a_checkpoint_survives_its_replacement(tmp_path):
    save(tmp_path / "ck")
    (tmp_path / "ck" / "notes.txt").write_text("mine")
    (tmp_path / "ck" / "plots").mkdir()
    save(tmp_path / "ck", 2.0)
    assert (tmp_path / "ck" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "ck" / "plots").is_dir()
    assert value(tmp_path / "ck") == 2.0


def test_a_web_address_is_refused():
    with pytest.raises(UnsupportedError, match="web address"):
        save("https://example.org/ck")
    assert not is_sharded("https://example.org/ck")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_checkpoint_is_not_replaced(tmp_path):
    save(tmp_path / "ck")
    (tmp_path / "ck").chmod(0o555)
    with pytest.raises(PermissionError, match="write-protected"):
        save(tmp_path / "ck", 2.0)


@pytest.mark.parametrize("where", ["tensors", "extras"])
def test_what_cannot_be_pickled_is_an_error_and_the_old_one_stays(where, tmp_path):
    save(tmp_path / "ck")
    parts = {"tensors": {"w": torch.ones(3)}, "extras": {}}
    parts[where]["bad"] = threading.Lock()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_sharded(tmp_path / "ck", **parts, ranks=ranks_of())
    assert value(tmp_path / "ck") == 1.0
    assert names(tmp_path) == ["ck"]


def test_two_values_for_one_key_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="duplicated"):
        write_sharded(tmp_path / "ck", {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, {}, ranks_of())
    assert names(tmp_path) == []


def test_the_manifest_names_all_files_and_no_place(tmp_path):
    save(tmp_path / "ck")
    text = (tmp_path / "ck" / "manifest.json").read_text()
    found = json.loads(text)
    assert found["files"].keys() == {".metadata", "__0_0.distcp", "meta.pt"}
    assert found["world_size"] == 1
    assert found["torch"] == str(torch.__version__)
    for file in (tmp_path / "ck").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_verify_reports_every_file_that_changed(tmp_path):
    save(tmp_path / "ck")
    assert verify(tmp_path / "ck") == []
    for name in ("__0_0.distcp", "meta.pt"):
        with open(tmp_path / "ck" / name, "r+b") as file:
            file.seek(700)
            file.write(b"X")
    assert [problem.split()[0] for problem in verify(tmp_path / "ck")] == ["__0_0.distcp", "meta.pt"]


def test_a_disk_that_is_full_is_an_error_and_the_old_one_stays(tmp_path):
    save(tmp_path / "ck")
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[0][1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_sharded(tmp_path / "ck", {"w": torch.ones(1_000_000)}, {}, ranks_of())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert value(tmp_path / "ck") == 1.0
    assert names(tmp_path) == ["ck"]


def test_drafts_that_nobody_holds_are_removed_and_others_stay(tmp_path):
    save(tmp_path / "ck")
    abandoned = ".ck.0123456789abcdef.partial"
    (tmp_path / abandoned).mkdir()
    (tmp_path / abandoned / "manifest.json").touch()
    (tmp_path / abandoned / "__0_0.distcp").touch()
    (tmp_path / ".ck.0123456789abcde0.partial").mkdir()
    (tmp_path / ".ck.of-somebody-else.partial").mkdir()
    held = draft.LocalDraft.begin(tmp_path / "ck")
    save(tmp_path / "ck", 2.0)
    assert names(tmp_path) == sorted(["ck", ".ck.of-somebody-else.partial", os.path.basename(held.address[0])])
    held.discard()
    assert names(tmp_path) == [".ck.of-somebody-else.partial", "ck"]


def test_where_folders_cannot_be_exchanged_they_are_renamed_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(publication, "exchange", lambda first, second: False)
    save(tmp_path / "ck")
    save(tmp_path / "ck", 2.0)
    assert value(tmp_path / "ck") == 2.0
    assert names(tmp_path) == ["ck"]


def test_a_replacement_that_died_between_two_renames_leaves_the_old_one(tmp_path):
    save(tmp_path / "ck")
    (tmp_path / "ck").rename(tmp_path / ".ck.0123456789abcdef.previous")
    assert is_sharded(tmp_path / "ck")
    assert value(tmp_path / "ck") == 1.0
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "ck", 2.0, {"bad": threading.Lock()})
    assert value(tmp_path / "ck") == 1.0
    save(tmp_path / "ck", 3.0)
    assert value(tmp_path / "ck") == 3.0
    assert names(tmp_path) == ["ck"]


def aside(folder, number, content, age):
    """A checkpoint that was moved aside ``age`` seconds ago."""
    path = folder / f".ck.{number:016x}.previous"
    save(path, content)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


@pytest.mark.parametrize("newest", [1, 2])
def test_of_several_that_were_moved_aside_the_newest_counts(newest, tmp_path):
    for number in (1, 2):
        aside(tmp_path, number, float(number), 0 if number == newest else 60)
    assert value(tmp_path / "ck") == newest
    draft.LocalDraft.begin(tmp_path / "ck").discard()
    assert value(tmp_path / "ck") == newest
    assert names(tmp_path) == ["ck"]


def test_what_was_removed_in_part_is_no_checkpoint(tmp_path):
    (aside(tmp_path, 1, 1.0, 0) / ".metadata").unlink()
    aside(tmp_path, 2, 2.0, 60)
    assert value(tmp_path / "ck") == 2.0


def test_what_was_moved_aside_is_removed_before_it_can_come_back(tmp_path):
    save(tmp_path / "ck", 3.0)
    (aside(tmp_path, 1, 1.0, 0) / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "ck", 4.0, {"bad": threading.Lock()})
    assert names(tmp_path) == ["ck"]
    assert value(tmp_path / "ck") == 3.0
    assert (tmp_path / "ck" / "notes.txt").read_text() == "mine"


def test_very_long_names_work(tmp_path):
    for name in ("n" * 250, "n" * 249 + "m"):
        save(tmp_path / name)
        save(tmp_path / name, 2.0)
        assert value(tmp_path / name) == 2.0


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, fabric_core.checkpoint.sharded as s; s.is_sharded; s.open_sharded; s.ranks_of; s.write_sharded;"
        "assert 'torch.distributed.checkpoint' not in sys.modules and 'fsspec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
