"""The ``fabric`` command: its commands are names in the registry and are loaded when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner

from fabric_core.cli.main import CommandGroup
from fabric_core.errors import CheckpointError, InvalidArgumentError, WorkerFailedError
from fabric_core.registry.builtin import TABLE
from fabric_core.registry.contract import CORE_VERSION
from plugin_site import PluginSite

Fabric = Callable[..., Any]
COMMANDS = """
    import click

    @click.command()
    @click.option("--times", type=int)
    def as_click(times):
        click.echo(f"click {times}")

    def as_function(words):
        print("function", *words)
        return 3
"""


@pytest.fixture
def foo(site: PluginSite) -> None:
    site.module("foo_cli", COMMANDS)
    site.dist("fabric-foo", {"fabric.cli": {"as-click": "foo_cli:as_click", "as-function": "foo_cli:as_function"}})


@pytest.mark.usefixtures("foo")
def test_a_plugins_click_command_runs(fabric: Fabric) -> None:
    assert fabric("as-click", "--times", "2").stdout == "click 2\n"


@pytest.mark.usefixtures("foo")
def test_a_plugins_function_gets_the_words_and_its_number_is_the_exit_code(fabric: Fabric) -> None:
    done = fabric("as-function", "--help", "a", "--b=c")
    assert (done.stdout, done.returncode) == ("function --help a --b=c\n", 3)


@pytest.mark.usefixtures("foo")
def test_help_shows_all_commands_and_where_they_come_from(fabric: Fabric) -> None:
    text = fabric("--help").stdout
    assert "as-click     (from fabric-foo 1.0)" in text
    for name in TABLE["command"]:
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3, f"command {name!r} has no line of help"


def test_a_command_that_cannot_be_imported_says_so_in_one_line(fabric: Fabric, site: PluginSite) -> None:
    site.dist("fabric-bad", {"fabric.cli": {"bad": "no_such_module:f"}})
    done = fabric("bad")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: command 'bad' of fabric-bad 1.0 is found, but importing")
    assert "Traceback" not in done.stderr


def test_a_plugin_cannot_take_over_a_command_of_core(fabric: Fabric, site: PluginSite) -> None:
    site.dist("fabric-bad", {"fabric.cli": {"plugins": "no_such_module:f"}})
    assert fabric("plugins", "list").returncode == 0


def test_an_unknown_command_is_a_usage_error(fabric: Fabric) -> None:
    done = fabric("instal")
    assert done.returncode == 2
    assert "No such command 'instal'" in done.stderr


def test_the_version_is_that_of_the_core(fabric: Fabric) -> None:
    assert fabric("--version").stdout == f"fabric {CORE_VERSION}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("what to type"), 2),
        (CheckpointError("what to type"), 1),
        (WorkerFailedError("what", 137), 137),
    ],
)
def test_an_error_on_purpose_ends_with_its_message_and_a_code(error: Exception, code: int) -> None:
    class Fails(CommandGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return click.Command(cmd_name, callback=self.fail)

        def fail(self) -> None:
            raise error

    done = CliRunner().invoke(Fails("fabric"), ["anything"])
    assert done.exit_code == code
    assert done.output.startswith("Error: what")


@pytest.mark.parametrize(
    ("typed", "offered"), [("fabric plug", "plug-in"), ("fabric plug", "plugins"), ("fabric plugins show fo", "foo")]
)
def test_completing_a_command_or_a_plugin_imports_neither(
    fabric: Fabric, site: PluginSite, typed: str, offered: str
) -> None:
    site.dist("fabric-foo", {"fabric.cli": {"plug-in": "no_such_module:f"}, "fabric.loggers": {"foo": "no_such:F"}})
    place = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = fabric(_FABRIC_COMPLETE="bash_complete", **place)
    assert f"plain,{offered}" in done.stdout.splitlines()


def test_a_plan_that_cannot_work_is_explained_without_a_traceback(fabric: Fabric) -> None:
    done = fabric("explain", "--accelerator", "cpu", "--strategy", "single_device", "--devices", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: strategy='single_device'")
