"""``fabric run``: start a script, or a module, in as many processes as were asked for.

This process imports no torch: it starts the workers, watches them, and shows the first failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from fabric_core import settings
from fabric_core.cli.devices import check_accelerator, check_name, check_precision, processes_for
from fabric_core.distributed.port import reserve_port
from fabric_core.launchers.failure import render
from fabric_core.launchers.processes import Crew, Placement
from fabric_core.launchers.supervisor import INTERRUPT_PATIENCE, Supervisor
from fabric_core.launchers.terminal import typed_at_terminal
from fabric_core.launchers.threads import set_num_threads_if_needed
from fabric_core.resolve.request import VARIABLES
from fabric_core.settings import Setting

_TERMINATION_PATIENCE: Final = 30.0  # whoever sends SIGTERM decides how long to wait, and kills
_MULTI_NODE_PORT: Final = 29400


class RunCommand(click.Command):
    """Takes its own options before and after the script's name; everything else after the name is the script's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Sort the words into options of this command and words for the script; ``--`` ends the former."""
        own = {word for option in self.params if isinstance(option, click.Option) for word in option.opts}
        return super().parse_args(ctx, _sorted_words(args, own - {"--help"}))


def _sorted_words(words: list[str], own: set[str]) -> list[str]:
    options: list[str] = []
    rest: list[str] = []
    while words:
        word, words = words[0], words[1:]
        if word == "--":
            rest += words
            break
        if word in ("-m", "--module") and not rest:
            options += ["--module"]
            rest, words = [*words[:1]], words[1:]
        elif word.partition("=")[0] in own - {"--module"}:
            taken = 0 if "=" in word else 1
            options += [word, *words[:taken]]
            words = words[taken:]
        elif word.startswith("-") and not rest:
            options.append(word)  # before the script's name it can only be ours: click says what is wrong with it
        else:
            rest.append(word)
    return [*options, "--", *rest] if rest else options


@dataclass(frozen=True)
class Job:
    """What is to be started on this node."""

    target: tuple[str, ...]
    num_processes: int
    num_nodes: int
    node_rank: int
    main_address: str
    main_port: int | None
    exported: Mapping[Setting, object]

    def place(self, local_rank: int, port: int) -> Placement:
        """Where one worker stands."""
        return Placement(local_rank, self.num_processes, self.node_rank, self.num_nodes, self.main_address, port)


@click.command("run", cls=RunCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--accelerator", help="Kind of device: a registered name, gpu, or auto.")
@click.option("--strategy", help="How the model is spread: a registered name, or auto.")
@click.option("--devices", help='Devices of this node: "2", "0,1", "-1", auto. Default: the script decides.')
@click.option("--num-nodes", "--num_nodes", type=click.IntRange(1), help="Nodes in all. Default: 1.")
@click.option("--node-rank", "--node_rank", type=click.IntRange(0), default=0, show_default=True, help="This node.")
@click.option("--main-address", "--main_address", default="127.0.0.1", show_default=True, help="Address of node 0.")
@click.option(
    "--main-port",
    "--main_port",
    type=click.IntRange(1, 65535),
    help=f"Port on node 0. Default: a free one, or {_MULTI_NODE_PORT} with several nodes.",
)
@click.option("--precision", help="A precision's name, such as bf16-mixed.")
@click.option("--module", is_flag=True, help="-m, --module NAME: run a module instead of a script, as python -m does.")
@click.argument("target", metavar="SCRIPT [ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, /, target: tuple[str, ...], **options: Any) -> None:
    """Start SCRIPT in one process per device, and end all of them when one fails.

    What is typed here stands in for the arguments of Fabric(...) in the script; what is not typed is left to it.
    """
    job = job_from(target, options)
    if options["devices"] is None and job.num_nodes == 1 and job.main_port is None:
        become(job)
    ctx.exit(start(job))


def job_from(target: Sequence[str], options: Mapping[str, Any]) -> Job:
    """Check what was typed, and decide the number of processes.

    Raises:
        click.UsageError: something that cannot work; the message says what would.
    """
    if not target:
        raise click.UsageError("Name the script to run: fabric run --devices 2 train.py")
    if not options["module"] and not Path(target[0]).exists():
        raise click.UsageError(f"There is no script {target[0]!r} in {os.getcwd()}.")
    num_nodes = options["num_nodes"] or 1
    if options["node_rank"] >= num_nodes:
        raise click.UsageError(
            f"--node-rank {options['node_rank']} with --num-nodes {num_nodes}: nodes count from 0 to {num_nodes - 1}."
        )
    check_accelerator(options["accelerator"])
    check_name("strategy", options["strategy"])
    check_precision(options["precision"])
    typed = {setting: options[name] for name, setting in VARIABLES.items() if options[name] is not None}
    return Job(
        target=("-m", *target) if options["module"] else tuple(target),
        num_processes=processes_for(options["devices"], options["accelerator"]),
        num_nodes=num_nodes,
        node_rank=options["node_rank"],
        main_address=options["main_address"],
        main_port=options["main_port"] or (_MULTI_NODE_PORT if num_nodes > 1 else settings.STANDALONE_PORT.integer()),
        exported={**typed, settings.CLI_USED: 1},
    )


def become(job: Job) -> NoReturn:
    """Turn this process into the script, as ``python SCRIPT`` would be, with what was typed in its environment.

    The number of processes was not typed, so it is the script's to say; its own ``Fabric`` starts the others.
    """
    for setting, value in job.exported.items():
        setting.set(value)
    command = [sys.executable, *job.target]
    if sys.platform == "win32":  # there, exec ends the parent at once, and the shell goes on
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def start(job: Job) -> int:
    """Run the job's part on this node to its end; return the exit code."""
    set_num_threads_if_needed(job.num_processes)
    with ExitStack() as stack:
        port = stack.enter_context(reserve_port()).port if job.main_port is None else job.main_port
        crew = Crew()
        stack.callback(crew.close)
        with _signals_end(crew.supervisor):
            for local_rank in range(job.num_processes):
                place = job.place(local_rank, port)
                crew.start(job.target, place, {**_torchrun_variables(place), **job.exported})
            outcome = crew.supervisor.watch()
    if outcome.first is not None and outcome.signal is None:
        sys.stderr.write(render(outcome.first, outcome.failures) + "\n")
    return outcome.exit_code


def _torchrun_variables(place: Placement) -> dict[Setting, object]:
    """What programs made for torchrun find in their environment, beside the ranks."""
    return {
        settings.GROUP_RANK: place.node_rank,
        settings.GROUP_WORLD_SIZE: place.num_nodes,
        settings.ROLE_NAME: "default",
        settings.ROLE_RANK: place.rank,
        settings.ROLE_WORLD_SIZE: place.world_size,
        settings.TORCHELASTIC_RUN_ID: f"fabric-{os.getpid()}",
        settings.TORCHELASTIC_RESTART_COUNT: 0,
        settings.TORCHELASTIC_MAX_RESTARTS: 0,
    }


@contextmanager
def _signals_end(supervisor: Supervisor) -> Iterator[None]:
    """While entered, signals that would end this process end the workers first."""

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT:
            supervisor.interrupt(number, forward=not typed_at_terminal(), patience=INTERRUPT_PATIENCE)
        else:
            supervisor.interrupt(number, forward=True, patience=_TERMINATION_PATIENCE)

    previous: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                previous[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
