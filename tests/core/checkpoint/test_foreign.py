"""A checkpoint that only a plugin can read, loaded under strategies that know nothing of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.abc.hooks import hookimpl
from fabric_core.checkpoint.foreign import find_foreign
from fabric_core.errors import CheckpointError, CheckpointKeyError, InvalidTypeError, UnsafeCheckpointError
from fabric_core.registry import get_registry

sys.path.insert(0, os.path.dirname(__file__))
from noted_format import NotesPlugin, write_notes  # type: ignore[import-not-found]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.two.weight = self.one.weight


def trained(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25)
    module.other(module.two(module.one(torch.ones(1, 4)))).sum().backward()
    optimizer.step()
    return module, optimizer


def by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = [name for name, _ in module.named_parameters()]
    state = {names[number]: dict(entries) for number, entries in optimizer.state_dict()["state"].items()}
    for entries in state.values():
        entries["step"] = entries["step"].item()
    return {"state": state, "param_groups": [{**optimizer.state_dict()["param_groups"][0], "params": names}]}


@pytest.fixture
def plugin() -> Iterator[NotesPlugin]:
    made = NotesPlugin()
    undo = get_registry().add_hooks(made)
    yield made
    undo()


@pytest.fixture
def folder(tmp_path: Path, plugin: NotesPlugin) -> Path:
    module, optimizer = trained(1)
    state = {"model": module.state_dict(), "optimizer": by_name(module, optimizer)}
    write_notes(tmp_path / "run" / "noted", state, step=3, names=["a"])
    return tmp_path / "run" / "noted"


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == its and torch.equal(value, its_value) for (name, value), (its, its_value) in pairs)


def test_module_optimizer_and_values_are_restored(folder: Path) -> None:
    (module, optimizer), (there, its_optimizer) = trained(2), trained(1)
    state: dict[str, Any] = {"model": module, "optimizer": optimizer, "step": 0}
    rest = Fabric(accelerator="cpu", devices=1).load(folder, state)
    assert equal(module, there)
    assert (state["step"], rest) == (3, {"names": ["a"]})
    for mine, its in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], its["exp_avg"])


def test_states_that_nobody_asked_for_are_not_returned(folder: Path) -> None:
    module, _ = trained(2)
    rest = Fabric(accelerator="cpu", devices=1).load(folder, {"model": module})
    assert rest == {"step": 3, "names": ["a"]}
    assert equal(module, trained(1)[0])


def test_all_of_it_comes_back_without_a_state_and_ties_stay(folder: Path) -> None:
    content = Fabric(accelerator="cpu", devices=1).load(folder)
    assert content.keys() == {"model", "optimizer", "step", "names"}
    assert content["model"]["one.weight"] is content["model"]["two.weight"]
    assert torch.equal(content["model"]["other.bias"], trained(1)[0].other.bias)


def test_load_raw_finds_the_module(folder: Path) -> None:
    module, _ = trained(2)
    Fabric(accelerator="cpu", devices=1).load_raw(folder, module)
    assert equal(module, trained(1)[0])


def test_names_that_are_missing_are_listed(folder: Path) -> None:
    state = {"model": trained(2)[0], "stepp": 0, "ema": 1}
    with pytest.raises(CheckpointKeyError, match="has no 'stepp', 'ema'; it has 'model', 'optimizer', 'step'"):
        Fabric(accelerator="cpu", devices=1).load(folder, state)


def test_what_an_interrupted_replacement_moved_aside_is_found(folder: Path) -> None:
    folder.rename(folder.with_name(f".noted.{'0' * 16}.previous"))
    assert Fabric(accelerator="cpu", devices=1).load(folder)["step"] == 3


def test_the_readers_errors_are_the_loads(tmp_path: Path, plugin: NotesPlugin) -> None:
    write_notes(tmp_path / "x", {}, code="print()")
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(UnsafeCheckpointError, match="It holds code"):
        fabric.load(tmp_path / "x")
    assert fabric.load(tmp_path / "x", weights_only=False) == {"code": "print()"}


def test_a_tensor_with_too_few_numbers_is_damage(folder: Path) -> None:
    (folder / "0.bin").write_bytes(bytes(8))
    with pytest.raises(CheckpointError, match="16 elements brought 2"):
        Fabric(accelerator="cpu", devices=1).load(folder, {"model": trained(2)[0]})


def test_a_folder_that_no_plugin_knows_is_none(tmp_path: Path, plugin: NotesPlugin) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder, not a checkpoint file"):
        Fabric(accelerator="cpu", devices=1).load(tmp_path)
    assert plugin.asked == [str(tmp_path)]


def test_nobody_is_asked_about_files_and_stores(tmp_path: Path, plugin: NotesPlugin) -> None:
    torch.save({"step": 1}, tmp_path / "x.ckpt")
    assert Fabric(accelerator="cpu", devices=1).load(tmp_path / "x.ckpt") == {"step": 1}
    assert find_foreign("memory://x") is None
    assert plugin.asked == []


def test_an_answer_that_is_no_reader_is_named(tmp_path: Path) -> None:
    class Wrong(NotesPlugin):
        @hookimpl
        def fabric_checkpoint_reader(self, path: str) -> Any:
            return 1

    undo = get_registry().add_hooks(Wrong())
    try:
        with pytest.raises(InvalidTypeError, match="fabric_checkpoint_reader answered 1, where a function"):
            find_foreign(tmp_path)
    finally:
        undo()


def loaded_by_all(folder: str, strategy: str) -> list[float]:
    undo = get_registry().add_hooks(NotesPlugin())
    try:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        module = nn.Linear(4, 2)
        model = fabric.setup_module(module)
        rest = fabric.load(folder, {"other": model})
        assert rest == {"step": 4}
        state = model.state_dict()
        values = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in state.values()]
        return [number for value in values for number in value.flatten().tolist()]
    finally:
        undo()


needs_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch shards on CPU from 2.7 on")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_every_rank_reads_its_part(strategy: str, tmp_path: Path, workers: Any) -> None:
    torch.manual_seed(0)
    there = nn.Linear(4, 2)
    write_notes(tmp_path / "noted", {"other": there.state_dict()}, step=4)
    expected = [number for value in there.state_dict().values() for number in value.flatten().tolist()]
    assert workers(2).run(loaded_by_all, str(tmp_path / "noted"), strategy) == [expected, expected]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_one_file_of_it_leads_to_the_folder(folder: Path, below: str) -> None:
    (folder / below).mkdir(exist_ok=True)
    file = folder / below / "part.pt"
    file.write_bytes(b"not for torch")
    with pytest.raises(CheckpointError, match="notes checkpoint in the folder") as caught:
        Fabric(accelerator="cpu", devices=1).load(file, {"model": Tied()})
    assert repr(str(folder)) in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_file_beside_it_fails_for_its_own_reason(folder: Path) -> None:
    file = folder.parent / "part.pt"
    file.write_bytes(b"not for torch")
    with pytest.raises(CheckpointError) as caught:
        Fabric(accelerator="cpu", devices=1).load(file, {"model": Tied()})
    assert str(folder) not in str(caught.value)


def test_a_file_that_can_be_read_inside_it_is_read(folder: Path) -> None:
    torch.save({"step": 7}, folder / "mine.pt")
    assert Fabric(accelerator="cpu", devices=1).load(folder / "mine.pt") == {"step": 7}
