"""A configuration comes from a dictionary, a file, or the file that a variable names."""

import json
import re

import pytest
from deepspeed_models import assembled

from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_deepspeed.config.document import zero_stage

pytestmark = pytest.mark.usefixtures("isolated")
VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return path


def test_a_file_is_read(file):
    assert zero_stage(assembled(str(file))) == 3
    assert zero_stage(assembled(file)) == 3


def test_the_variable_names_a_file_where_none_is_given(file, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(file))
    assert zero_stage(assembled()) == 3
    assert zero_stage(assembled({})) == 0


def test_an_empty_variable_names_none(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert zero_stage(assembled()) == 2


def test_a_missing_file_is_named_with_the_folder_that_it_is_seen_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"{re.escape(str(tmp_path))}/no\.json.*'no\.json', seen from '{tmp_path}'"
    ):
        assembled("no.json")


def test_a_missing_file_of_the_variable_is_said_to_come_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "no.json"))
    with pytest.raises(FileNotFoundError, match=VARIABLE):
        assembled()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder"):
        assembled(tmp_path)


def test_broken_json_is_shown_with_its_place(file):
    file.write_text('{\n  "zero_optimization": {"stage": 3,}\n}')
    with pytest.raises(InvalidArgumentError, match=r"zero\.json.*line 2, column \d+: '\"zero_optimization\""):
        assembled(file)


def test_an_empty_file_is_broken(file):
    file.write_text("")
    with pytest.raises(InvalidArgumentError, match="line 1"):
        assembled(file)


def test_a_key_given_twice_is_refused(file):
    file.write_text('{"steps_per_print": 1, "steps_per_print": 2}')
    with pytest.raises(InvalidArgumentError, match="keys twice in one object: steps_per_print"):
        assembled(file)


def test_something_else_than_an_object_is_refused(file):
    file.write_text("[1, 2]")
    with pytest.raises(InvalidTypeError, match="holds a list"):
        assembled(file)


def test_text_in_place_of_a_path_is_recognised():
    with pytest.raises(InvalidArgumentError, match=r"json\.loads"):
        assembled('{"steps_per_print": 1}')


def test_something_else_than_a_configuration_is_refused():
    with pytest.raises(InvalidTypeError, match="config is a list"):
        assembled([1])


@pytest.mark.parametrize("name", ["zero_optimization", "aio", "activation_checkpointing", "fp16", "bf16"])
def test_a_section_has_to_be_a_dictionary(name):
    with pytest.raises(InvalidTypeError, match=f"{name}=3"):
        assembled({name: 3})


def test_the_user_s_dictionary_is_never_changed():
    config = {"zero_optimization": {"cpu_offload": True, "stage": 2}, "aio": {"thread_count": 2}}
    before = json.dumps(config)
    document = assembled(config, pin_memory=True)
    assert json.dumps(config) == before
    assert document["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
