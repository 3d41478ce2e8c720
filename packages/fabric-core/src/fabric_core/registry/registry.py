"""The registry: names to references without an import, references to objects with exactly one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fabric_core.errors import InvalidArgumentError, MisconfigurationException, UnknownPluginError, UsageError
from fabric_core.keywords import accepted
from fabric_core.registry import builtin as core
from fabric_core.registry import loading, refusals, switches
from fabric_core.registry.discovery import Discovery
from fabric_core.registry.fingerprint import fingerprint
from fabric_core.registry.known import Known
from fabric_core.registry.lookup import Lookup, usable_names
from fabric_core.registry.ref import GROUPS, HOOK_GROUP, Entry, PluginRef, check_kind, name_key
from fabric_core.registry.runtime import Runtime, direct_ref
from fabric_core.registry.table import Table

if TYPE_CHECKING:
    from fabric_core.registry.diagnosis import Finding
    from fabric_core.registry.hooks import HookManager
    from fabric_core.registry.hookspecs import HookRelay

Target = TypeVar("Target", bound=Callable[..., Any])


class Registry:
    """Everything that can be chosen by name: core's own plugins, installed ones, and what the program registers.

    Constructing one costs nothing; installed distributions are looked through once, when a question needs it. Use
    ``get_registry()`` unless you want one that shares nothing, as tests do.

    Args:
        entry_points: take these instead of what is installed.
        builtin: core's own plugins, by kind and name.
        hook_modules: core's own hook modules, by label.
        known: the names that belong to Fabric's own backends.
    """

    def __init__(
        self,
        entry_points: Iterable[Entry] | None = None,
        *,
        builtin: Table | None = None,
        hook_modules: Mapping[str, str] | None = None,
        known: Known | None = None,
    ) -> None:
        self._builtin = core.TABLE if builtin is None else builtin
        self._hook_modules = core.HOOKS if hook_modules is None else hook_modules
        self._known = known or Known()
        self._discovery = Discovery(entry_points)
        self._runtime = Runtime()
        self._lookup = Lookup(self._discovery, self._runtime, self._builtin, self._known)
        self._targets: dict[tuple[str, str, str], Callable[..., Any]] = {}
        self._hooks: HookManager | None = None
        self._hooks_lock = threading.RLock()
        self._hooks_loading = False

    def names(self, kind: str) -> list[str]:
        """The names that can be passed, aliases included."""
        return usable_names(self.refs(kind))

    def refs(self, kind: str | None = None) -> list[PluginRef]:
        """Every plugin of a kind, or of all kinds, with its status and the reason for it."""
        kinds = GROUPS if kind is None else (kind,)
        return [ref for one in kinds for ref in self._lookup.refs(one)]

    def find(self, kind: str, name: str, *, static: bool = False) -> PluginRef:
        """The one plugin that the name means. No plugin is imported, and a name of core's needs no scan.

        Besides plain names it takes ``"distribution::name"`` and ``"package.module:Class"``. Before a name is given
        up, hook modules are loaded, since they may register names, and installed distributions are read again;
        ``static=True`` leaves hook modules alone.

        ``UnknownPluginError``, ``AmbiguousPluginError``, ``IncompatiblePluginError`` or ``PluginBlockedError``.
        """
        return self._lookup.find(kind, name, _nothing if static else self._load_late_names)

    def unknown(self, name: str, kind: str | None = None) -> UnknownPluginError:
        """The error for a name that nothing has: who would provide it, what was probably meant, what there is."""
        return self._lookup.unknown(tuple(GROUPS) if kind is None else (check_kind(kind),), name)

    def resolve(self, kind: str, plugin: str | PluginRef | Callable[..., Any]) -> Callable[..., Any]:
        """The class or function itself. Exactly one module is imported, once; safe to call from several threads.

        Takes what ``find`` takes, what it returned, or a class or function, which it checks and gives back. Besides
        the errors of ``find``: ``PluginLoadError`` with the original error chained.
        """
        return self._resolve(self._ref(kind, plugin), plugin)

    def create(self, kind: str, plugin: str | PluginRef | Callable[..., Any], **kwargs: Any) -> Any:
        """An instance. Keywords that the class or function does not take are left out, so that core can add some."""
        ref = self._ref(kind, plugin)
        target = self._resolve(ref, plugin)
        kwargs = accepted(target, kwargs)
        if self.has_hook("fabric_create"):
            return self.hooks.fabric_create(ref=ref, target=target, kwargs=kwargs)
        return target(**kwargs)

    def _ref(self, kind: str, plugin: str | PluginRef | Callable[..., Any]) -> PluginRef:
        if callable(plugin):
            return direct_ref(kind, plugin)
        if not isinstance(plugin, PluginRef):
            return self.find(kind, plugin)
        if plugin.kind != kind:
            raise InvalidArgumentError(f"{plugin} is no {kind}.")
        return plugin

    def _resolve(self, ref: PluginRef, plugin: str | PluginRef | Callable[..., Any]) -> Callable[..., Any]:
        if ref.status in ("blocked", "incompatible"):
            raise refusals.unusable(ref)
        if callable(plugin):
            return loading.checked(plugin, ref)
        registration = self._runtime.get(ref.kind, ref.name)
        if registration is not None and registration.ref == ref and not isinstance(registration.target, str):
            return loading.checked(registration.target, ref)
        key = (ref.kind, ref.dist, ref.value)
        if key not in self._targets:
            # No lock here: Python's import system has its own, and holding a second one around an import can
            # deadlock with a module that uses the registry while it is imported.
            self._targets.setdefault(key, loading.load(ref))
        return self._targets[key]

    @overload
    def register(
        self, kind: str, name: str, target: Callable[..., Any] | str, *, override: bool = False
    ) -> Callable[[], None]: ...
    @overload
    def register(self, kind: str, name: str, *, override: bool = False) -> Callable[[Target], Target]: ...
    def register(self, kind: str, name: str, target: Any = None, *, override: bool = False) -> Callable[..., Any]:
        """Make a class, a function or an import string known by name in this process; call the result to undo.

        Without a target it is a decorator. A name that core or the program already uses needs ``override=True``.
        """
        of_core = map(name_key, self._builtin.get(check_kind(kind), {}))
        taken = self._runtime.get(kind, name) is not None or name_key(name) in of_core
        if not name or ":" in name:
            raise InvalidArgumentError(f"name={name!r} cannot be registered: it must be text without a colon.")
        if taken and not override:
            raise MisconfigurationException(f"{kind} {name!r} is registered already: pass override=True to replace it.")
        if target is not None:
            return self._runtime.add(kind, name, target)

        def decorate(decorated: Target) -> Target:
            self._runtime.add(kind, name, decorated)
            return decorated

        return decorate

    @property
    def hooks(self) -> HookRelay:
        """Calls hooks: ``registry.hooks.fabric_on_init(fabric=...)``. The first use loads all hook modules."""
        return self._hook_manager().relay

    def has_hook(self, name: str) -> bool:
        """Whether anybody implements the hook. A set look-up after the first call, which loads all hook modules."""
        return self._hook_manager().has(name)

    def add_hooks(self, plugin: object, label: str | None = None) -> Callable[[], None]:
        """Let an object of the program take part as hook modules do; call the result to remove it."""
        return self._hook_manager().add(plugin, label or f"program::{id(plugin):x}")

    def refresh(self) -> None:
        """See what was installed since; hook modules that are new are loaded when hooks are next used."""
        self._discovery.refresh()

    def diagnose(self) -> list[Finding]:
        """Everything about installed plugins that a user should know, found without importing a target."""
        from fabric_core.registry.diagnosis import diagnose

        failures = {} if self._hooks is None else self._hooks.failures
        return diagnose(self.refs(), self._discovery.damaged() if switches.current().autoload else (), failures)

    def fingerprint(self, refs: Iterable[PluginRef]) -> tuple[str, ...]:
        """What stands behind the references on this machine, to be compared between ranks."""
        return fingerprint(refs, self._discovery)

    def _hook_manager(self) -> HookManager:
        if self._hooks is None or self._hooks.generation != self._discovery.generation:
            with self._hooks_lock:
                self._load_hooks()
        assert self._hooks is not None
        return self._hooks

    def _load_hooks(self) -> None:
        from fabric_core.registry.hooks import HookManager

        if self._hooks_loading:
            raise UsageError("hooks are used while they are being loaded: move the call into a function.")
        self._hooks_loading = True
        try:
            current = switches.current()
            manager = self._hooks
            if manager is None:
                manager = HookManager(self, strict=current.strict)
                manager.load_core(self._hook_modules)
            manager.generation = self._discovery.generation
            manager.load(self._hook_entries(current), self._known.minimum)
            self._hooks = manager
        finally:
            self._hooks_loading = False

    def _hook_entries(self, current: switches.Switches) -> Iterator[Entry]:
        entries = self._discovery.entries() if current.autoload else ()
        # In the same order on every machine: where several could answer, the order decides.
        for entry in sorted(entries, key=lambda entry: (entry.dist, entry.name)):
            if entry.group == HOOK_GROUP and not current.blocked(entry.dist):
                yield entry

    def _load_late_names(self) -> None:
        with self._hooks_lock:  # another thread's loading is waited for, this thread's own is not interrupted
            if not self._hooks_loading:
                self._hook_manager()


def _nothing() -> None:
    """Registers no late names."""


_registry: Registry | None = None
_registry_lock = threading.Lock()


def get_registry() -> Registry:
    """The registry of this process; the same one at every call, made at the first."""
    global _registry  # the one piece of state that is meant to be shared
    with _registry_lock:
        if _registry is None:
            _registry = Registry()
        return _registry
