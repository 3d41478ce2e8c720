"""Which failure was first, and how it reads."""

import pytest

from fabric_core.launchers.failure import Failure, exit_code_of, first_of, from_exception, from_exit_code, render


def failure(rank, when, summary="ValueError: x"):
    return Failure(rank, "host", when, 1, summary, f"Traceback...\n{summary}")


def test_the_earliest_failure_is_first():
    assert first_of([failure(1, 2.0), failure(0, 1.0)]).rank == 0


@pytest.mark.parametrize("text", ["Connection reset by peer", "Broken pipe", "Timed out waiting 1000ms"])
def test_a_lost_connection_is_a_consequence_even_if_it_was_noticed_earlier(text):
    assert first_of([failure(1, 2.0), failure(0, 1.0, f"RuntimeError: {text}")]).rank == 1


def test_no_failure_is_first_of_none():
    assert first_of([]) is None


def test_a_report_survives_its_writer(tmp_path):
    failure(1, 2.0).write(tmp_path / "report.json")
    assert Failure.read(tmp_path / "report.json") == failure(1, 2.0)
    assert Failure.read(tmp_path / "other.json") is None


@pytest.mark.parametrize(("value", "code"), [(None, 0), (3, 3), ("text", 1), (256 + 7, 7), (-1, 255)])
def test_exit_codes_are_those_of_python(value, code):
    assert exit_code_of(SystemExit(value)) == code


def test_a_signal_has_a_name_and_the_shells_exit_code():
    killed = from_exit_code(0, -9)
    assert (killed.summary, killed.exit_code) == ("ended by SIGKILL", 137)


def test_a_chained_error_is_shown_whole():
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as error:
        shown = from_exception(0, error)
    assert "KeyError: 'inner'" in shown.text
    assert "direct cause" in shown.text
    assert shown.summary == "ValueError: outer"


def test_all_other_failures_share_one_line():
    text = render(failure(2, 0.0), [failure(rank, 1.0, "RuntimeError: lost") for rank in range(4)])
    assert text.splitlines()[-1] == "Afterwards rank 0, 1, 3 failed too: RuntimeError: lost"
