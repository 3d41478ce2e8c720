"""The hooks: every place where an installed plugin can take part without being chosen by name.

A hook module implements some of them as plain functions, with any subset of the arguments, marked with
``fabric_core.abc.hooks.hookimpl``. Hooks serve construction and life cycle; nothing that runs per step is a hook.

An implementation that raises counts as not having answered, and one warning names its distribution: a plugin that
nobody chose must not stop a job. ``FABRIC_PLUGINS_STRICT=1`` lets the error through. The one exception is
``fabric_create``, whose error is the creation's error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pluggy

from fabric_core.abc.hooks import PROJECT, Candidate, Problem, ResolveContext

if TYPE_CHECKING:
    from fabric_core.checkpoint.foreign import CheckpointReader
    from fabric_core.registry.ref import PluginRef
    from fabric_core.registry.registry import Registry
    from fabric_core.types import Path

hookspec = pluggy.HookspecMarker(PROJECT)
Offer: TypeAlias = "Candidate | Iterable[Candidate] | None"


class HookSpecs:
    """Every hook with its arguments and what it may return.

    A plugin may subclass it for the types, override what it needs with ``@hookimpl`` and name the class, instead of a
    module, in its entry point; what is not overridden is not called.
    """

    @hookspec
    def fabric_accelerator_candidates(self, ctx: ResolveContext) -> Offer:
        """Offer accelerators where the user left the choice open, or named an alias such as ``gpu``.

        The highest priority that is available wins; a tie is an error. Must not initialise the device's runtime. An
        offer that is not available says why.
        """

    @hookspec
    def fabric_environment_candidates(self, ctx: ResolveContext) -> Offer:
        """Offer cluster environments that this process seems to run in. The highest available priority wins."""

    @hookspec(firstresult=True)
    def fabric_select_strategy(self, ctx: ResolveContext) -> str | None:
        """Name the strategy for ``strategy="auto"``, if ``ctx.accelerator`` is one of the plugin's own; else ``None``.

        Core answers last.
        """

    @hookspec(firstresult=True)
    def fabric_select_precision(self, ctx: ResolveContext) -> str | None:
        """Name the precision where none was given, if ``ctx.accelerator`` is one of the plugin's own; else ``None``."""

    @hookspec
    def fabric_validate(self, plan: Any) -> Iterable[Problem] | None:
        """Say what cannot work in a plan that uses the plugin. One error lists the problems of all plugins."""

    @hookspec(firstresult=True)
    def fabric_create(self, ref: PluginRef, target: Any, kwargs: dict[str, Any]) -> Any:
        """Make the object that ``target(**kwargs)`` would make; ``None`` leaves it to the next one, core last.

        The only hook that may be a wrapper (``@hookimpl(wrapper=True)``), to see or change what was made.
        """

    @hookspec(historic=True)
    def fabric_register(self, registry: Registry) -> None:
        """Register names that cannot be static. Called once per hook module, when it is loaded."""

    @hookspec
    def fabric_on_init(self, fabric: Any) -> None:
        """``Fabric(...)`` was constructed."""

    @hookspec
    def fabric_on_launch(self, fabric: Any) -> None:
        """This process became a rank of the job; collectives work. Called on every rank."""

    @hookspec
    def fabric_on_setup(self, fabric: Any, module: Any, optimizers: list[Any]) -> None:
        """A module, its optimizers or both were set up; ``module`` is ``None`` for optimizers alone."""

    @hookspec
    def fabric_on_save(self, fabric: Any, path: Path, state: Mapping[str, Any]) -> None:
        """A checkpoint was written. Called on every rank."""

    @hookspec
    def fabric_on_load(self, fabric: Any, path: Path, state: Any) -> None:
        """A checkpoint was read into ``state``. Called on every rank."""

    @hookspec
    def fabric_on_teardown(self, fabric: Any) -> None:
        """The job ends in this process."""

    @hookspec
    def fabric_environment_report(self) -> Mapping[str, Any] | None:
        """Facts for a bug report: versions, drivers, devices. Plain values by name."""

    @hookspec(firstresult=True)
    def fabric_checkpoint_reader(self, path: str) -> CheckpointReader | None:
        """What reads the checkpoint in the local folder ``path``, if it is of the plugin's own layout; else ``None``.

        Asked about folders that core does not know, by loads and by the command line. It looks at names of files and no
        further. ``fabric_core.checkpoint.foreign`` says what a reader is; it is called outside of the hook, so that its
        errors are those of the load.
        """


class HookRelay(Protocol):
    """The calling side of the hooks, as ``registry.hooks`` offers it. Arguments by keyword; no ``None`` in lists."""

    def fabric_accelerator_candidates(self, *, ctx: ResolveContext) -> list[Candidate | Iterable[Candidate]]:
        """The offers of all plugins."""

    def fabric_environment_candidates(self, *, ctx: ResolveContext) -> list[Candidate | Iterable[Candidate]]:
        """The offers of all plugins."""

    def fabric_select_strategy(self, *, ctx: ResolveContext) -> str | None:
        """The first answer."""

    def fabric_select_precision(self, *, ctx: ResolveContext) -> str | None:
        """The first answer."""

    def fabric_validate(self, *, plan: Any) -> list[Iterable[Problem]]:
        """The problems that each plugin sees."""

    def fabric_create(self, *, ref: PluginRef, target: Any, kwargs: dict[str, Any]) -> Any:
        """The object."""

    def fabric_on_init(self, *, fabric: Any) -> list[Any]:
        """Tell all."""

    def fabric_on_launch(self, *, fabric: Any) -> list[Any]:
        """Tell all."""

    def fabric_on_setup(self, *, fabric: Any, module: Any, optimizers: list[Any]) -> list[Any]:
        """Tell all."""

    def fabric_on_save(self, *, fabric: Any, path: Path, state: Mapping[str, Any]) -> list[Any]:
        """Tell all."""

    def fabric_on_load(self, *, fabric: Any, path: Path, state: Any) -> list[Any]:
        """Tell all."""

    def fabric_on_teardown(self, *, fabric: Any) -> list[Any]:
        """Tell all."""

    def fabric_environment_report(self) -> list[Mapping[str, Any]]:
        """The reports of all plugins."""

    def fabric_checkpoint_reader(self, *, path: str) -> CheckpointReader | None:
        """The first answer."""


HOOKS = frozenset(name for name in vars(HookSpecs) if name.startswith(f"{PROJECT}_"))
"""The names of all hooks."""
