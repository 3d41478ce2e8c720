"""DeepSpeed's folders without DeepSpeed: consolidated, converted, inspected, loaded under other strategies."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import STAGES, Net, apart, inner, launched, outputs, run, saved_run, set_up, train, whole
from click.testing import CliRunner, Result

from fabric_core import Fabric
from fabric_core.checkpoint.conversion.consolidate import consolidate
from fabric_core.cli.main import cli
from fabric_core.errors import UnsafeCheckpointError
from fabric_deepspeed.checkpoint.files import read_file


def command(*words: object) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def zero_to_fp32(folder: str) -> dict[str, Any]:
    import contextlib
    import io

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(folder)  # type: ignore[no-any-return]


def saved_by_two(folder: str, stage: int, precision: str) -> dict[str, Any]:
    found = saved_run(folder, stage, precision)
    theirs = zero_to_fp32(folder) if torch.distributed.get_rank() == 0 else {}
    return {**found, "theirs": theirs}


@pytest.fixture(scope="module")
def saved(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[Any, Any] = {}

    def get(stage: int, precision: str = "32-true") -> tuple[str, dict[str, Any]]:
        if (stage, precision) not in made:
            folder = str(tmp_path_factory.mktemp("run") / "ck")
            made[stage, precision] = folder, run(workers(2), saved_by_two, folder, stage, precision)[0]
        return made[stage, precision]

    return get


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_consolidated_weights_are_those_of_deepspeeds_own_program(
    stage: int, precision: str, saved: Any, tmp_path: Path
) -> None:
    folder, there = saved(stage, precision)
    content = torch.load(consolidate(folder, tmp_path / "x.ckpt"))
    assert (content["step"], list(content["model"])) == (3, list(Net().state_dict()))
    for name, value in there["theirs"].items():
        assert torch.equal(content["model"][name], value)
    missing = content["model"].keys() - there["theirs"].keys()
    assert missing == ({"frozen.weight", "frozen.bias"} if stage == 1 else set())  # it leaves them out there
    assert content["model"]["one.weight"].data_ptr() == content["model"]["two.weight"].data_ptr()


@pytest.mark.parametrize("stage", STAGES)
def test_a_plain_model_says_the_same(stage: int, saved: Any, tmp_path: Path) -> None:
    folder, there = saved(stage)
    content = torch.load(consolidate(folder, tmp_path / "x.ckpt"))
    assert torch.equal(outputs(content["model"]), outputs(there["weights"]))


@pytest.mark.parametrize("stage", STAGES)
def test_a_single_process_loads_the_folder_into_a_plain_model(stage: int, saved: Any) -> None:
    folder, there = saved(stage)
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(fabric, seed=8)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    assert fabric.load(folder, state) == {}
    assert state["step"] == 3
    assert apart(whole(fabric, model), there["weights"]) == 0
    train(fabric, model, optimizer, 3, 6)
    assert apart(whole(fabric, model), there["after"]) < 1e-6


def test_load_raw_takes_the_folder_too(saved: Any) -> None:
    folder, there = saved(3)
    model = Net()
    Fabric(accelerator="cpu", devices=1).load_raw(folder, model)
    assert apart(model.state_dict(), there["weights"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_line_knows_the_folder(stage: int, saved: Any, tmp_path: Path) -> None:
    folder, there = saved(stage)
    facts = json.loads(command("checkpoint", "inspect", folder, "--json", "--keys").output)
    assert facts["format"] == "deepspeed"
    assert facts["written_by"] == f"DeepSpeed {version('deepspeed')}, by Fabric"
    assert facts["world_size"] == 2
    parts = {part["name"]: part["kind"] for part in facts["parts"]}
    assert parts == {"model": "module", "optimizer": "optimizer", "step": "int"}
    tied = {row["name"]: row["tied_to"] for row in facts["keys"]}
    assert tied["model.two.weight"] == "model.one.weight"
    assert "Not damaged" in command("checkpoint", "inspect", folder, "--verify").output
    for words in (["consolidate", folder, "--output_file"], ["checkpoint", "consolidate", folder, "--output"]):
        file = tmp_path / f"{words[0]}.ckpt"
        assert command(*words, file).exit_code == 0
        assert apart(torch.load(file)["model"], there["weights"]) == 0


def test_it_is_converted(saved: Any, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder, there = saved(3)
    assert command("checkpoint", "convert", folder, tmp_path / "x.safetensors").exit_code == 0
    once = {name: value for name, value in there["weights"].items() if name != "two.weight"}  # the format has no ties
    assert apart(load_file(tmp_path / "x.safetensors"), once) == 0
    assert command("checkpoint", "convert", folder, f"{tmp_path}/sharded/").exit_code == 0
    content = Fabric(accelerator="cpu", devices=1).load(tmp_path / "sharded")
    assert apart(content["model"], there["weights"]) == 0
    assert content["optimizer"]["state"].keys() == {"first.weight", "first.bias", "scale", "norm.weight"} | {
        "norm.bias",
        "one.weight",
    }


def test_damage_in_any_file_is_found(saved: Any, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(saved(2)[0], tmp_path / "ck")
    file = folder / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[content.index(b"data/0") + 200] ^= 255
    file.write_bytes(content)
    result = command("checkpoint", "inspect", folder, "--verify")
    assert result.exit_code == 1
    assert f"checkpoint/{file.name}" in result.output


def test_deepspeed_is_not_imported_for_it(saved: Any, tmp_path: Path) -> None:
    program = (
        "import sys; from fabric_core.checkpoint.conversion.consolidate import consolidate;"
        f"consolidate({saved(3)[0]!r}, {str(tmp_path / 'x')!r}); sys.exit('deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def native(folder: str, stage: int, client: dict[str, Any], tag: str) -> dict[str, Any]:
    """What plain DeepSpeed writes: no names, client state beside its own."""
    fabric = launched(stage)
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, 0, 2)
    inner(model).save_checkpoint(folder, tag=tag, client_state=client)
    weights = whole(fabric, model)
    losses = train(fabric, model, optimizer, 2, 4)
    fabric.teardown()
    fabric = launched(stage)
    model, optimizer = set_up(fabric, seed=4)
    state: dict[str, Any] = {"net": model, "opt": optimizer, "epoch": 0}
    rest = fabric.load(folder, state)
    same = apart(weights, whole(fabric, model)), losses == train(fabric, model, optimizer, 2, 4)
    fabric.teardown()
    return {"same": same, "rest": rest, "epoch": state["epoch"], "weights": weights}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tag", ["checkpoint", "global_step2"])
def test_lightnings_and_deepspeeds_own_checkpoints_load(stage: int, tag: str, tmp_path: Path, workers: Any) -> None:
    folder = str(tmp_path / "ck")
    found = run(workers(2), native, folder, stage, {"epoch": 7, "names": ["a"]}, tag)[0]
    assert found["same"] == (0, True)
    assert (found["epoch"], found["rest"]) == (7, {"names": ["a"]})
    content = Fabric(accelerator="cpu", devices=1).load(folder)
    assert content.keys() == {"model", "optimizer", "epoch", "names"}
    assert apart(content["model"], found["weights"]) == 0


def read_by_deepspeed(folder: str, stage: int) -> dict[str, Any]:
    first = saved_run(folder, stage)
    fabric = launched(stage)
    model, optimizer = set_up(fabric, seed=4)
    _, client = inner(model).load_checkpoint(folder)
    same = apart(first["weights"], whole(fabric, model)), first["losses"] == train(fabric, model, optimizer, 3, 6)
    fabric.teardown()
    return {"same": same, "step": client["step"]}


@pytest.mark.parametrize("stage", STAGES)
def test_plain_deepspeed_loads_what_fabric_wrote(stage: int, tmp_path: Path, workers: Any) -> None:
    found = run(workers(2), read_by_deepspeed, str(tmp_path / "ck"), stage)[0]
    assert found == {"same": (0, True), "step": 3}


class Looked:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enumeration: as a call of ``getattr``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, self.name)


def test_a_stage_may_be_pickled_as_a_look_up_and_nothing_else_is_looked_up(tmp_path: Path) -> None:
    torch.save({"stage": Looked("weights")}, tmp_path / "file")
    assert read_file(str(tmp_path / "file"), None) == {"stage": 3}
    torch.save({"stage": Looked("__class__")}, tmp_path / "file")
    with pytest.raises(UnsafeCheckpointError, match="NOT loaded"):
        read_file(str(tmp_path / "file"), None)
