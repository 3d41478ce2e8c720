"""The variables that stand in for constructor arguments."""

import pytest

from fabric_core import Fabric

CASES = {
    "accelerator": ("LT_ACCELERATOR", "cpu", "cpu"),
    "strategy": ("LT_STRATEGY", "ddp_spawn", "ddp_spawn"),
    "precision": ("LT_PRECISION", "64-true", "64-true"),
    "num_nodes": ("LT_NUM_NODES", "2", "2"),
    "devices": ("LT_DEVICES", "2", "2 x cpu"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_variable_stands_in_for_an_argument(name, monkeypatch):
    variable, text, shown = CASES[name]
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # several nodes must be told
    monkeypatch.setenv("MASTER_PORT", "29400")
    monkeypatch.setenv(variable, text)
    row = Fabric().plan.as_dict()[name]
    assert (row["value"], row["origin"]) == (shown, f"{variable}={text}")


def test_without_the_command_line_a_variable_wins_over_code(monkeypatch):
    monkeypatch.setenv("LT_DEVICES", "3")
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    assert fabric.world_size == 3


def test_a_variable_that_agrees_with_code_is_fine(monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    monkeypatch.setenv("LT_ACCELERATOR", "cpu")
    fabric = Fabric(precision="BF16-mixed", accelerator="CPU", devices=1)
    assert fabric.plan.precision.name == "bf16-mixed"


def test_what_the_command_line_did_not_type_is_free_to_choose(monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    assert Fabric(accelerator="cpu", devices=1, precision="64-true").plan.precision.name == "64-true"


def test_a_default_in_code_gives_way_to_the_command_line(monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_PRECISION", "64-true")
    fabric = Fabric(accelerator="auto", strategy="auto", devices="auto", num_nodes=1, precision=None)
    assert fabric.plan.precision.name == "64-true"


def test_a_number_of_nodes_that_is_no_number_names_the_variable(monkeypatch):
    monkeypatch.setenv("LT_NUM_NODES", "many")
    with pytest.raises(ValueError, match="LT_NUM_NODES=many"):
        Fabric()


def test_a_switch_that_is_no_switch_is_refused(monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "perhaps")
    with pytest.raises(ValueError, match="LT_CLI_USED='perhaps' is not a switch"):
        Fabric()
