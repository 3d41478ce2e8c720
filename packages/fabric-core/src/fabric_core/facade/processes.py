"""Starting the processes of a job and joining them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from fabric_core.errors import InvalidTypeError
from fabric_core.facade.base import FabricBase
from fabric_core.registry.fingerprint import check_same


def go_on(fabric: Any) -> None:
    """What ``launch`` runs if it is given nothing: the script goes on in every process."""


class Processes(FabricBase):
    """``launch``, ``run`` and ``teardown``."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The body of a program, for subclasses to fill; calling it launches the processes first."""

    def launch(self, function: Callable[..., Any] = go_on, *args: Any, **kwargs: Any) -> Any:
        """Start the processes of this job and join them; return rank 0's result of ``function``.

        Without a function, this and the new processes go on with the script. A second call without a function does
        nothing. Under ``fabric run`` and ``torchrun`` the processes are there already.

        Args:
            function: run in every process with this object as first argument; needed by strategies that spawn.
            *args: passed on to the function.
            **kwargs: passed on to the function.

        Raises:
            TypeError: the function cannot be called like that, or is missing where the strategy needs one.
        """
        launcher = self._strategy.launcher
        _check_function(function, launcher, self._plan.strategy.name, self._launched)
        if self._launched or launcher is None:
            return self._in_process(function, *args, **kwargs)
        return launcher.launch(self._in_process, function, *args, **kwargs)

    def _in_process(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The part of ``launch`` that runs in every process."""
        self._enter_process()
        if function is go_on:
            return None
        from fabric_core.data.capture import capture_constructors

        with capture_constructors():
            return function(self, *args, **kwargs)

    def _enter_process(self) -> None:
        """Set the device and join the other processes, once."""
        if self._launched:
            return
        self._prepare_environment()
        self._launched = True
        if self.world_size > 1:
            self._check_same_plan()
        self._notify("fabric_on_launch")

    def _check_same_plan(self) -> None:
        """Every rank resolved the names by itself: the same plugins in the same versions must have come out."""
        mine = self._plan.fingerprint(self._registry)
        check_same(self.global_rank, mine, self._strategy.broadcast(mine, 0))

    def teardown(self) -> None:
        """Release devices, finish what is written in the background, leave the processes that ``launch`` joined.

        Every rank calls it, after its last step.

        Raises:
            CheckpointError: on all ranks, if a save in the background failed on one, which raises its own error.
        """
        self._notify("fabric_on_teardown")
        try:
            # On the way out with an exception the other ranks may be anywhere: each finishes what is its own.
            if self._launched and sys.exc_info()[0] is None:
                self._finish_saves("fabric.teardown()")
        finally:
            self._launched = self._environment_ready = False
            self._rank_zero_group = None
            self._strategy.teardown()


def _check_function(function: Any, launcher: Any, strategy: str, launched: bool) -> None:
    if function is go_on:
        if launcher is not None and launcher.requires_function and not launched:
            raise InvalidTypeError(
                f"strategy={strategy!r} runs a function in each process, so fabric.launch() needs one: "
                "define main(fabric) and call fabric.launch(main)."
            )
        return
    if not callable(function):
        raise InvalidTypeError(
            f"fabric.launch({function!r}): expected a function, not a {type(function).__name__}. Pass the function "
            "itself, fabric.launch(main), not the result of calling it, fabric.launch(main())."
        )
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # some builtins show no signature: trust the caller
        return
    if not parameters:
        name = getattr(function, "__name__", repr(function))
        raise InvalidTypeError(
            f"fabric.launch({name}): the function takes no argument, but it is given the Fabric object first. "
            f"Define it as def {name}(fabric): ..."
        )


def call_run(fabric: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run an overridden ``run`` in a launched process."""
    return run(fabric, *args, **kwargs)
