"""Each name stands for the arguments that are documented, costs nothing until it is chosen, and can be adjusted."""

import inspect
import json
import subprocess
import sys

import pytest

from fabric_core import Fabric
from fabric_core.abc import API_LEVEL
from fabric_core.errors import InvalidArgumentError
from fabric_core.keywords import accepted
from fabric_core.registry import get_registry
from fabric_deepspeed import DeepSpeedStrategy, presets

# name: stage, optimizer states go to, parameters go to
DOCUMENTED = {
    "deepspeed": (2, None, None),
    "deepspeed_stage_1": (1, None, None),
    "deepspeed_stage_1_offload": (1, "cpu", None),
    "deepspeed_stage_2": (2, None, None),
    "deepspeed_stage_2_offload": (2, "cpu", None),
    "deepspeed_stage_3": (3, None, None),
    "deepspeed_stage_3_offload": (3, "cpu", "cpu"),
    "deepspeed_stage_3_offload_nvme": (3, "nvme", "nvme"),
}


def outline(strategy):
    zero = strategy.config["zero_optimization"]
    return (zero["stage"], *(zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")))


def test_no_name_is_missing():
    names = {ref.name for ref in get_registry().refs("strategy") if ref.dist == "fabric-deepspeed"}
    assert names == set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_name_makes_the_strategy_with_the_documented_values(name):
    strategy = get_registry().create("strategy", name)
    assert isinstance(strategy, DeepSpeedStrategy)
    assert outline(strategy) == DOCUMENTED[name]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_name_can_be_passed_to_fabric(name):
    fabric = Fabric(accelerator="cpu", devices=1, strategy=name)
    assert outline(fabric.strategy) == DOCUMENTED[name]


def test_building_starts_on_the_disk_where_everything_goes_there():
    assert get_registry().create("strategy", "deepspeed_stage_3_offload_nvme").remote_device == "nvme"


def test_a_preset_takes_further_arguments():
    strategy = presets.stage_2(pin_memory=True, offload_optimizer=True)
    assert strategy.config["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert outline(presets.stage_3(stage=1)) == (1, None, None)


def test_a_preset_refuses_what_the_strategy_does_not_know():
    with pytest.raises(TypeError, match="stagee"):
        presets.stage_2(stagee=3)


def test_core_s_own_keywords_are_passed_only_if_the_strategy_takes_them():
    assert accepted(presets.stage_2, {"stage": 1, "from_a_newer_core": 1}) == {"stage": 1}
    strategy = get_registry().create("strategy", "deepspeed_stage_1", from_a_newer_core=1, pin_memory=False)
    assert outline(strategy) == (1, None, None)


def test_a_preset_shows_its_arguments():
    parameters = inspect.signature(presets.stage_3_offload).parameters
    assert (parameters["stage"].default, parameters["offload_parameters"].default) == (3, True)
    assert repr(presets.stage_1) == "Preset('deepspeed_stage_1': DeepSpeedStrategy(stage=1))"
    assert str(inspect.signature(presets.Preset)).startswith("(name")


def test_a_preset_is_of_core_s_contract_level():
    assert presets.stage_1.fabric_api == API_LEVEL


def test_the_class_and_its_presets_are_passed_likewise():
    assert outline(Fabric(accelerator="cpu", devices=1, strategy=DeepSpeedStrategy).strategy) == (2, None, None)


@pytest.mark.usefixtures("isolated")
def test_a_name_that_the_configuration_contradicts_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(path))
    with pytest.raises(InvalidArgumentError, match=r"stage=3 was asked for, .*strategy's name.*zero\.json"):
        Fabric(accelerator="cpu", devices=1, strategy="deepspeed_stage_3")
    assert Fabric(accelerator="cpu", devices=1, strategy="deepspeed").strategy.config["zero_optimization"] == {
        "stage": 2
    }


def imported_by(code):
    """Which modules of DeepSpeed, this package and torch a fresh process has imported after ``code``."""
    after = "\nimport sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + after], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1])) & {"fabric_deepspeed", "deepspeed", "torch"}


def test_presets_import_neither_torch_nor_deepspeed():
    assert imported_by("import fabric_deepspeed.presets") == {"fabric_deepspeed"}


def test_the_typed_sections_import_neither():
    code = "from fabric_deepspeed import DeepSpeedConfig, ZeroConfig; DeepSpeedConfig(ZeroConfig(stage=3)).document()"
    assert imported_by(code) == {"fabric_deepspeed"}


def test_listing_the_names_imports_nothing_of_this_package():
    code = """
import contextlib, io, sys
from fabric_core.__main__ import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    sys.argv = ["fabric", "plugins", "list"]
    main()
assert "deepspeed_stage_3_offload_nvme" in text.getvalue()
"""
    assert imported_by(code) & {"fabric_deepspeed", "deepspeed"} == set()


def test_choosing_the_strategy_does_not_import_deepspeed():
    assert "deepspeed" not in imported_by("import fabric_deepspeed.strategy")
