"""Loads hook modules and calls them. One that is broken costs its own plugin and no other.

pluggy has a loader of its own; it stops at the first module that fails and drops the second of two equal names without
a word, so the loop is ours.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import pluggy

from fabric_core.abc.hooks import PROJECT, Candidate, Problem, hookimpl
from fabric_core.errors import IncompatiblePluginError, InvalidArgumentError, InvalidTypeError, PluginLoadError
from fabric_core.registry.contract import version_problem
from fabric_core.registry.hookspecs import HOOKS, HookRelay, HookSpecs
from fabric_core.registry.loading import import_value
from fabric_core.registry.ref import CORE, Entry
from fabric_core.registry.switches import trace

if TYPE_CHECKING:
    from fabric_core.registry.registry import Registry

_UNGUARDED = frozenset({"fabric_create", "fabric_register"})  # their errors belong to whoever asked
_ANSWERS: dict[str, type] = {
    "fabric_accelerator_candidates": Candidate,
    "fabric_environment_candidates": Candidate,
    "fabric_select_strategy": str,
    "fabric_select_precision": str,
    "fabric_validate": Problem,
}
_CORE_CREATE = f"{CORE}::create"


class PluginWarning(UserWarning):
    """A plugin is broken in a way that lets the job go on without it."""


class HookManager:
    """The loaded hook modules.

    Attributes:
        failures: what could not be loaded, by origin.
        generation: which reading of the installed distributions it is up to date with.
        relay: call a hook as a method of it.
    """

    def __init__(self, registry: Registry, *, strict: bool = False) -> None:
        self._strict = strict
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        # pluggy calls the last registered first, so what core registers first answers last.
        self._manager.register(_CoreCreate(), _CORE_CREATE)
        # Historic: each module that is registered from now on is called by its registration.
        self._manager.hook.fabric_register.call_historic(kwargs={"registry": registry})
        self._seen: set[Entry] = set()
        self.failures: dict[str, BaseException] = {}
        self.generation = 0
        self.relay = cast(HookRelay, self._manager.hook)
        self._implemented: frozenset[str] = frozenset()

    def has(self, hook: str) -> bool:
        """Whether calling the hook would do anything that core does not do by itself."""
        if hook not in HOOKS:
            raise InvalidArgumentError(f"{hook!r} is no hook: use one of {', '.join(sorted(HOOKS))}.")
        return hook in self._implemented

    def load_core(self, modules: Mapping[str, str]) -> None:
        """Load core's own hook modules; they are not plugins, and their errors are not excused."""
        for label, value in modules.items():
            self.add(import_value(value), label, strict=True)

    def load(self, entries: Iterable[Entry], minimum: Mapping[str, str]) -> None:
        """Load the hook modules not loaded yet, in the order given, each on its own; one warning for each failure.

        Args:
            entries: where the modules are.
            minimum: the oldest version of a distribution that this core works with.
        """
        for entry in entries:
            if entry in self._seen:
                continue
            try:
                self._load_one(entry, minimum)
            except (Exception, SystemExit) as error:  # a plugin may raise anything; the next one must still be loaded
                self._report(f"{entry.dist} {entry.version}".strip(), error)
            self._seen.add(entry)

    def _load_one(self, entry: Entry, minimum: Mapping[str, str]) -> None:
        problem = version_problem(entry.dist, entry.version, entry.requires_core, minimum)
        if problem:
            raise IncompatiblePluginError(problem)
        twin = next((other for other in self._seen if other.value == entry.value), None)
        if twin is not None:
            raise InvalidArgumentError(f"{entry.value} is already the hook module of {twin.dist}")
        self.add(import_value(entry.value), f"{entry.dist}::{entry.name}")
        trace(f"hook module {entry.value} of {entry.dist} loaded")

    def _report(self, origin: str, error: Exception | SystemExit) -> None:
        self.failures[origin] = error
        what = f"the hooks of {origin} are not used: {type(error).__name__}: {error}"
        if self._strict:
            raise PluginLoadError(what) from error
        warnings.warn(PluginWarning(what), stacklevel=2)

    def add(self, plugin: object, label: str, *, strict: bool = False) -> Callable[[], None]:
        """Register a module, a class or an object with hook implementations; call the result to remove it.

        Unless ``strict``, or the switch says so, what its hooks raise becomes a warning.
        """
        instance = plugin() if inspect.isclass(plugin) else plugin
        guarded = _Guarded(self._manager, instance, label, strict or self._strict)
        try:
            self._manager.register(guarded, label)
            self._manager.check_pending()
        except BaseException:
            self._remove(guarded)
            raise
        self._note_implemented()
        return functools.partial(self._remove, guarded)

    def _remove(self, guarded: _Guarded) -> None:
        if self._manager.is_registered(guarded):
            self._manager.unregister(guarded)
        self._note_implemented()

    def _note_implemented(self) -> None:
        callers = ((name, getattr(self._manager.hook, name)) for name in HOOKS)
        self._implemented = frozenset(
            name for name, caller in callers if any(impl.plugin_name != _CORE_CREATE for impl in caller.get_hookimpls())
        )


class _CoreCreate:
    """Creation as it is without plugins, so that wrappers have something to wrap."""

    @hookimpl(trylast=True)
    def fabric_create(self, target: Any, kwargs: dict[str, Any]) -> Any:
        return target(**kwargs)


class _Guarded:
    """The hook implementations of one plugin, each kept from raising into the job. Everything else stays outside."""

    def __init__(self, manager: pluggy.PluginManager, plugin: object, label: str, strict: bool) -> None:
        self.label = label
        for name in dir(plugin):
            options = manager.parse_hookimpl_opts(plugin, name)
            if options is None:
                continue
            hook = options.get("specname") or name
            function = getattr(plugin, name)
            if hook not in _UNGUARDED:
                if options.get("wrapper") or options.get("hookwrapper"):
                    raise InvalidArgumentError(f"{hook} cannot be wrapped; only fabric_create can")
                function = function if strict else _guard(function, hook, label)
            setattr(self, name, function)

    def __repr__(self) -> str:
        return self.label  # pluggy puts it into its messages


def _check_answer(hook: str, answer: Any) -> None:
    """``InvalidTypeError`` for an answer that core could not use, so that it is blamed on the plugin that gave it."""
    if answer is None or hook not in _ANSWERS:
        return
    wanted = _ANSWERS[hook]
    several = list(answer) if isinstance(answer, (list, tuple, set, frozenset)) and wanted is not str else [answer]
    if not all(isinstance(one, wanted) for one in several):
        raise InvalidTypeError(f"{hook} answered {answer!r}, where {wanted.__name__} was expected")


def _guard(function: Callable[..., Any], hook: str, label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = function(*args, **kwargs)
            answer = list(answer) if inspect.isgenerator(answer) else answer  # so that it fails in here, if at all
            _check_answer(hook, answer)
            return answer
        except Exception as error:  # whatever it is, nobody chose this plugin
            what = f"{hook} of {label} failed and is passed over: {type(error).__name__}: {error}"
            warnings.warn(PluginWarning(what), stacklevel=2)
            return None

    return guarded
