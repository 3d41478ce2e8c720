import logging
import os
import subprocess
import sys
import warnings

import pytest

from fabric_core.errors import InvalidTypeError
from fabric_core.rank_zero import (
    WarningCache,
    rank_from_environment,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from fabric_core.warnings import (
    FabricDeprecationWarning,
    LightningDeprecationWarning,
    PossibleUserWarning,
    disable_possible_user_warnings,
    possible_user_warning,
)

VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    rank_zero_only.rank = None


def test_a_function_runs_on_rank_zero_only():
    both = rank_zero_only(lambda x: x), rank_zero_only(lambda x: x, default="d")
    assert [function(3) for function in both] == [3, 3]
    rank_zero_only.rank = 1
    assert [function(3) for function in both] == [None, "d"]


def test_a_method_keeps_its_name_and_its_self():
    class Model:
        @rank_zero_only
        def save(self):
            """Save it."""
            return self

    model = Model()
    assert model.save() is model
    assert (Model.save.__name__, Model.save.__doc__) == ("save", "Save it.")


@pytest.mark.parametrize("index", range(4))
def test_the_first_variable_that_is_set_gives_the_rank(index, monkeypatch):
    assert rank_from_environment() is None
    for value, name in list(enumerate(VARIABLES, start=1))[index:]:
        monkeypatch.setenv(name, str(value))
    assert rank_zero_only.rank == rank_from_environment() == index + 1


def test_the_rank_is_read_at_the_first_use_and_then_kept(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    assert rank_zero_only.rank == 2
    monkeypatch.setenv("RANK", "3")
    assert rank_zero_only.rank == 2


def test_without_a_launcher_the_rank_is_zero():
    assert rank_zero_only.rank == 0


def test_a_rank_of_another_type_is_refused():
    with pytest.raises(InvalidTypeError, match="'1'"):
        rank_zero_only.rank = "1"


def test_messages_name_the_line_that_gave_them(caplog):
    caplog.set_level(logging.DEBUG)
    rank_zero_debug("a %s", "b")
    rank_zero_info("c")
    WarningCache().info("d")
    assert caplog.messages == ["a b", "c", "d"]
    assert {(record.name, record.filename) for record in caplog.records} == {
        ("fabric_core", os.path.basename(__file__))
    }


@pytest.mark.parametrize(
    ("warn", "category"),
    [
        (rank_zero_warn, UserWarning),
        (rank_zero_deprecation, FabricDeprecationWarning),
        (possible_user_warning, PossibleUserWarning),
        (WarningCache().warn, UserWarning),
        (WarningCache().deprecation, FabricDeprecationWarning),
    ],
)
def test_warnings_name_the_line_that_gave_them(warn, category):
    with pytest.warns(category) as record:
        warn("message")
    assert (record[0].category, record[0].filename) == (category, __file__)


def test_other_ranks_say_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    rank_zero_only.rank = 1
    for say in (rank_zero_debug, rank_zero_info, rank_zero_warn, rank_zero_deprecation):
        say("message")
    assert not caplog.messages


def test_a_cache_gives_each_message_once():
    cache = WarningCache()
    with pytest.warns(UserWarning, match="a"):
        cache.warn("a")
    cache.warn("a")  # would be an error
    with pytest.warns(UserWarning, match="b"):
        cache.warn("b")
    assert cache == {"a", "b"}


def test_messages_are_led_by_the_rank_if_there_is_one():
    assert rank_prefixed_message("m", 3) == "[rank: 3] m"
    assert rank_prefixed_message("m", None) == "m"


@pytest.mark.parametrize("off", ["0", "off"])
def test_warnings_about_likely_mistakes_can_be_switched_off(off, monkeypatch):
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", off)
    possible_user_warning("m")
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "1")
    with pytest.warns(PossibleUserWarning):
        possible_user_warning("m")


def test_warnings_about_likely_mistakes_can_be_filtered_by_module():
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        disable_possible_user_warnings("elsewhere")
        possible_user_warning("shown")
        disable_possible_user_warnings()
        possible_user_warning("hidden")
        warnings.warn("other", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in record] == ["shown", "other"]


def test_the_name_of_the_deprecation_category_that_programs_filter_by_exists():
    assert LightningDeprecationWarning is FabricDeprecationWarning


def test_importing_loads_no_torch_and_adds_no_handler():
    code = (
        "import sys, logging, fabric_core.rank_zero, fabric_core.warnings, fabric_core.data;"
        "print('torch' in sys.modules, logging.getLogger('fabric_core').handlers, logging.root.handlers)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False [] []"
