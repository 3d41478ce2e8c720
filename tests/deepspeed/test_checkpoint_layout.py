"""Folders that are not what they should be, and files that would run code: what is said, and what is not done."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import Net, launched, message, run, saved_run, set_up

from fabric_core import Fabric
from fabric_core.errors import CheckpointError, UnsafeCheckpointError, UnsupportedError

# Older releases of DeepSpeed, which some tests import here, use what torch has since deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")
MODEL = "checkpoint/mp_rank_00_model_states.pt"
SECOND = "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def load(path: Any, **options: Any) -> Any:
    """Under a strategy that knows nothing of DeepSpeed."""
    return Fabric(accelerator="cpu", devices=1).load(path, **options)


def load_by_engine(path: str, weights_only: bool | None = None) -> str:
    fabric = launched(2)
    model, optimizer = set_up(fabric)
    state = {"model": model, "optimizer": optimizer}
    text = message(fabric.load, path, state, weights_only=weights_only)
    fabric.teardown()
    return text


@pytest.fixture(scope="module")
def sound(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "ck"
    run(workers(2), saved_run, str(folder), 2)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run" / "ck"))


def inner_folder(folder: Path) -> tuple[Path, str]:
    return folder / "checkpoint", f"is the folder 'checkpoint' inside the checkpoint '{folder}': pass that one."


def inner_file(folder: Path) -> tuple[Path, str]:
    return folder / MODEL, f"is one file of the checkpoint '{folder}': pass that folder."


def latest_file(folder: Path) -> tuple[Path, str]:
    return folder / "latest", f"is one file of the checkpoint '{folder}': pass that folder."


def without_latest(folder: Path) -> tuple[Path, str]:
    (folder / "latest").unlink()
    return folder, "has no file 'latest', which is written last: the save did not come to its end"


def inner_without_latest(folder: Path) -> tuple[Path, str]:
    (folder / "latest").unlink()
    return folder / "checkpoint", f"write its name into '{folder}/latest', and pass '{folder}'."


def another_tag(folder: Path) -> tuple[Path, str]:
    (folder / "latest").write_text("global_step9")
    return folder, "names 'global_step9', where no file *model_states.pt is. These have: 'checkpoint'; write one"


def nothing(folder: Path) -> tuple[Path, str]:
    return folder.parent / "other", f"There is no checkpoint at '{folder.parent / 'other'}'"


MISTAKES = [inner_folder, inner_file, latest_file, without_latest, inner_without_latest, another_tag, nothing]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_with_what_to_pass(mistake: Callable[[Path], Any], folder: Path, workers: Any) -> None:
    path, hint = mistake(folder)
    for text in run(workers(2), load_by_engine, str(path)):
        assert text.startswith("FileNotFoundError: ")
        assert hint in text


@pytest.mark.parametrize("mistake", [inner_folder, without_latest, inner_without_latest, another_tag])
def test_other_strategies_say_the_same(mistake: Callable[[Path], Any], folder: Path) -> None:
    path, hint = mistake(folder)
    with pytest.raises(FileNotFoundError) as caught:
        load(path)
    assert hint in str(caught.value)


def test_the_file_of_a_rank_is_missing(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match=r"2 ranks wrote it, and the files \*optim_states.pt of ranks 1 are miss"):
        load(folder)


def test_a_tag_outside_of_the_folder(folder: Path) -> None:
    (folder / "latest").write_text("../ck/checkpoint")
    with pytest.raises(CheckpointError, match="which is no folder inside this one"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "a mixture of experts"),
        ("mp_rank_01_model_states.pt", "a model that was split by layers or within layers"),
    ],
)
def test_other_kinds_of_parallelism_are_named(name: str, what: str, folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "checkpoint" / name)
    with pytest.raises(UnsupportedError, match=what):
        load(folder)


@pytest.mark.parametrize("name", [MODEL, SECOND])
def test_a_file_that_was_cut_off(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged: it begins like a checkpoint, but its end is missing"):
        load(folder)


class Intruder:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", [MODEL, SECOND])
def test_no_file_gets_to_run_code(name: str, folder: Path, tmp_path: Path, workers: Any) -> None:
    content = torch.load(folder / name, weights_only=False, map_location="cpu")
    torch.save({**content, "extra": Intruder(tmp_path / "mark")}, folder / name)
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: the list has no order
    with pytest.raises(UnsafeCheckpointError) as caught:
        load(folder)
    texts = [str(caught.value), *run(workers(2), load_by_engine, str(folder))]
    for text in texts:
        assert f"'{os.path.basename(name)}' was NOT loaded: it holds posix.mkdir, and building these runs code" in text
        assert "pass weights_only=False" in text
    assert not (tmp_path / "mark").exists()
    assert set(torch.serialization.get_safe_globals()) == before
    assert load(folder, weights_only=False)["step"] == 3
    assert (tmp_path / "mark").exists()


def test_a_bare_pickle_does_not_either(folder: Path, tmp_path: Path) -> None:
    (folder / MODEL).write_bytes(pickle.dumps({"module": Intruder(tmp_path / "mark")}, protocol=2))
    with pytest.raises(CheckpointError):
        load(folder)
    assert not (tmp_path / "mark").exists()


def test_the_engine_takes_trusted_files(folder: Path, tmp_path: Path, workers: Any) -> None:
    content = torch.load(folder / MODEL, weights_only=False, map_location="cpu")
    torch.save({**content, "note": {1: frozenset("a")}}, folder / MODEL)
    assert all(text.startswith("UnsafeCheckpointError") for text in run(workers(2), load_by_engine, str(folder)))
    assert run(workers(2), load_by_engine, str(folder), False) == ["nothing was raised"] * 2


def test_the_old_format_of_torch_is_read(folder: Path) -> None:
    for name in (MODEL, SECOND):
        content = torch.load(folder / name, weights_only=False, map_location="cpu")
        torch.save(content, folder / name, _use_new_zipfile_serialization=False)
    assert load(folder)["model"].keys() == Net().state_dict().keys()
