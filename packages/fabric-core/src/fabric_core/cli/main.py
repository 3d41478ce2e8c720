"""The ``fabric`` command: a group whose commands are names in the registry, core's own and those of plugins."""

from __future__ import annotations

from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from fabric_core.errors import (
    AmbiguousPluginError,
    FabricError,
    InvalidArgumentError,
    InvalidTypeError,
    UnknownPluginError,
    WorkerFailedError,
)
from fabric_core.registry import PluginRef, get_registry
from fabric_core.registry.contract import CORE_VERSION
from fabric_core.registry.ref import CORE, name_key

HELP: Final[dict[str, str]] = {
    "run": "Start a script in as many processes as it takes.",
    "plugins": "Show which plugins are installed and which can be used.",
    "explain": "Show what a run would use, and why.",
    "checkpoint": "Show what a checkpoint holds, or convert it.",
    "consolidate": "Write a sharded checkpoint as a single file.",
}
"""What each of core's commands does, in a line; here, so that help needs to import none of them."""
_TYPED_WRONG = (InvalidArgumentError, InvalidTypeError, UnknownPluginError, AmbiguousPluginError)


class CommandGroup(click.Group):
    """A group that knows its commands by name only."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands that can be run."""
        return get_registry().names("command")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command; ``None`` if there is none of that name."""
        registry = get_registry()
        claims = [ref for ref in registry.refs("command") if _answers_to(ref, cmd_name)]
        return _as_command(cmd_name, registry.resolve("command", cmd_name)) if claims else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands; what plugins add is shown with its origin."""
        with formatter.section("Commands"):
            formatter.write_dl(_described())

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command."""
        own = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=text) for name, text in _described() if name.startswith(incomplete)), *own]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors on purpose end it with their message."""
        try:
            return super().invoke(ctx)
        except FabricError as error:
            # Its message is all the user needs; a traceback would hide it.
            click.echo(f"Error: {error}", err=True)
            ctx.exit(_exit_code(error))


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(CORE_VERSION, prog_name="fabric", message="%(prog)s %(version)s")
def cli() -> None:
    """Take a PyTorch loop from a laptop CPU to many accelerators."""


def _exit_code(error: FabricError) -> int:
    if isinstance(error, WorkerFailedError):
        return error.exit_code
    return 2 if isinstance(error, _TYPED_WRONG) else 1  # 2 as click does for what it can tell is wrong by itself


def _described() -> list[tuple[str, str]]:
    refs = [ref for ref in get_registry().refs("command") if ref.status == "ok"]
    return [
        (name, HELP.get(name, "") if ref.dist == CORE else f"(from {ref.origin})") for ref in refs for name in ref.names
    ]


def _answers_to(ref: PluginRef, name: str) -> bool:
    return ref.qualified == name or name_key(name) in map(name_key, ref.names)


def _as_command(name: str, target: Any) -> click.Command:
    if isinstance(target, click.Command):
        return target

    # A plain function gets the words as they are; its result, if a number, is the exit code.
    @click.command(name, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def call(ctx: click.Context, words: tuple[str, ...]) -> None:
        result = target(list(words))
        ctx.exit(result if isinstance(result, int) else 0)

    return call
