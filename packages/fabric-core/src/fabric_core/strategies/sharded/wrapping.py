"""Which modules are sharded as units: each unit's parameters are gathered together, and freed together."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import nn

from fabric_core.errors import InvalidTypeError
from fabric_core.rank_zero import rank_zero_warn
from fabric_core.warnings import user_stacklevel

Policy: TypeAlias = Any
"""Classes, a function ``(module, recurse, nonwrapped_numel) -> bool``, or one of ``torch.distributed.fsdp.wrap``."""

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_COLLECTIONS = (set, frozenset, list, tuple)
_SHOWN = 12


@dataclass(frozen=True)
class Unit:
    """One module to shard by itself.

    Attributes:
        module: the module.
        overrides: what the policy asks for it alone, as arguments of ``FullyShardedDataParallel``.
    """

    module: nn.Module
    overrides: Mapping[str, Any] = field(default_factory=dict)


def check_policy(argument: str, policy: Policy | None) -> None:
    """``TypeError`` unless ``policy`` is of one of the kinds above, or ``None``."""
    if isinstance(policy, _COLLECTIONS):
        for one in policy:
            if not (isinstance(one, type) and issubclass(one, nn.Module)):
                raise InvalidTypeError(f"{argument} lists {one!r} ({type(one).__name__}): expected classes of modules.")
    elif hasattr(policy, "_run_policy"):  # the one method that all of torch's policy objects have
        return
    elif policy is not None and (isinstance(policy, type) or not callable(policy)):
        raise InvalidTypeError(
            f"{argument}={policy!r} ({type(policy).__name__}): expected a set of module classes, a function "
            "(module, recurse, nonwrapped_numel) -> bool, or a policy object of torch.distributed.fsdp.wrap."
        )
    elif policy is not None:
        _asking(policy, argument)


def choose_units(
    root: nn.Module,
    policy: Policy | None,
    ignored: set[nn.Module] | None = None,
    places: set[tuple[nn.Module, str]] | None = None,
    also: Collection[nn.Module] = (),
) -> list[Unit]:
    """The units inside ``root``, inner before outer; the root, which is always one, is not among them.

    Args:
        root: the whole module.
        policy: ``None`` takes blocks that repeat, see ``repeated_blocks``; an empty set takes none.
        ignored: modules that are no units, with all inside them.
        places: module and name of parameters that are not sharded.
        also: modules that are units whatever the policy says.

    Parameters that are tied across units move to the unit around them, with a warning.
    """
    ignored, places = ignored or set(), places or set()
    chosen = dict(selected(root, policy, ignored, places))
    asked = policy is not None and not (isinstance(policy, _COLLECTIONS) and not policy)
    if asked and not chosen:
        rank_zero_warn(
            f"auto_wrap_policy={policy!r} matches no module of {type(root).__name__}, so that all its parameters are "
            f"gathered at once. Classes with parameters in it: {_classes(root)}.",
            stacklevel=user_stacklevel(),
        )
    chosen = {**dict.fromkeys(also, MappingProxyType({})), **chosen}
    units = [Unit(module, chosen[module]) for module in _inner_first(root) if module in chosen]
    return _without_split_ties(root, units, places)


def selected(
    root: nn.Module,
    policy: Policy | None,
    ignored: set[nn.Module] | None = None,
    places: set[tuple[nn.Module, str]] | None = None,
) -> dict[nn.Module, Mapping[str, Any]]:
    """The modules inside ``root`` that the policy picks and that can be called, with what it asks for each alone."""
    ignored, places = ignored or set(), places or set()
    picked: Iterable[nn.Module]
    alone: Mapping[nn.Module, Mapping[str, Any]] = {}
    if policy is None:
        picked = repeated_blocks(root, ignored, places)
    elif hasattr(policy, "_run_policy"):
        picked = alone = policy._run_policy(root, ignored_modules=ignored, root_kwargs={})
    elif isinstance(policy, _COLLECTIONS):
        picked = [module for module in root.modules() if isinstance(module, tuple(policy))]
    else:
        picked = _by_function(root, policy, ignored, places)
    return {
        module: alone.get(module, {})
        for module in picked
        if module is not root and module not in ignored and has_forward(module)
    }


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called; lists and dictionaries of modules cannot."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def repeated_blocks(
    root: nn.Module, ignored: set[nn.Module] | None = None, places: set[tuple[nn.Module, str]] | None = None
) -> list[nn.Module]:
    """The blocks that a model is a stack of: the default units.

    A model that names its blocks as models of Hugging Face do, in ``_no_split_modules``, is taken at its word. Else
    they are the modules that stand in a ``ModuleList``, ``ModuleDict`` or ``Sequential`` together with others of their
    class. Modules without parameters do not count. Where such a block is itself a list or a ``Sequential``, its own
    blocks are taken instead if it has any.
    """
    sharded = _Sharded(ignored or set(), places or set())
    named = {name for module in root.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    blocks = [module for module in root.modules() if type(module).__name__ in named and sharded.any_in(module)]
    return blocks or list(dict.fromkeys(_repeated_in(root, sharded)))


def _repeated_in(module: nn.Module, sharded: _Sharded) -> Iterator[nn.Module]:
    children = [child for child in module.children() if sharded.any_in(child)]
    counts = Counter(type(child) for child in children) if isinstance(module, _LISTS) else Counter()
    for child in children:
        if counts[type(child)] < 2:
            yield from _repeated_in(child, sharded)
        elif isinstance(child, _LISTS):
            inner = list(_repeated_in(child, sharded))
            yield from inner or ([child] if has_forward(child) else [])
        else:
            yield child


@dataclass(frozen=True)
class _Sharded:
    """Tells the parameters that are sharded from those that are not."""

    ignored: set[nn.Module]
    places: set[tuple[nn.Module, str]]

    def any_in(self, module: nn.Module) -> bool:
        return self.count(module) > 0

    def count(self, module: nn.Module) -> int:
        """Number of elements, each parameter once."""
        found = {
            id(parameter): parameter.numel()
            for part in module.modules()
            if part not in self.ignored
            for name, parameter in part.named_parameters(recurse=False)
            if (part, name) not in self.places
        }
        return sum(found.values())


def _by_function(
    root: nn.Module, policy: Callable[..., Any], ignored: set[nn.Module], places: set[tuple[nn.Module, str]]
) -> list[nn.Module]:
    """Ask the policy on the way down whether to go deeper, and on the way up whether to take the module.

    On the way down it is told how many elements the module has, on the way up how many of them no unit inside took.
    """
    ask = _asking(policy)
    sharded = _Sharded(ignored, places)
    taken: dict[nn.Module, int] = {}  # elements of each module that units hold, itself included
    units = []

    def visit(module: nn.Module) -> int:
        if module in ignored or module in taken:
            return taken.get(module, 0)
        size = sharded.count(module)
        taken[module] = 0
        if ask(module, True, size):
            inside = sum(visit(child) for child in module.children())
            unit = module is not root and has_forward(module) and ask(module, False, size - inside)
            taken[module] = size if unit else inside
            if unit:
                units.append(module)
        return taken[module]

    visit(root)
    return units


def _asking(policy: Callable[..., Any], argument: str = "policy") -> Callable[[nn.Module, bool, int], bool]:
    """Call the policy by keyword, as torch does, or by position where its parameters have other names."""
    try:
        signature = inspect.signature(policy)
    except (TypeError, ValueError):  # some callables written in C show no signature
        return lambda module, recurse, size: bool(policy(module=module, recurse=recurse, nonwrapped_numel=size))
    try:
        signature.bind(module=None, recurse=True, nonwrapped_numel=0)
    except TypeError:
        try:
            signature.bind(None, True, 0)
        except TypeError:
            raise InvalidTypeError(
                f"{argument}={policy!r} cannot be called with (module, recurse, nonwrapped_numel). recurse=True asks "
                "whether to look inside the module, recurse=False whether to take it; nonwrapped_numel is how many "
                "elements no module inside has taken. To pick by class, pass a set of classes."
            ) from None
        return lambda module, recurse, size: bool(policy(module, recurse, size))
    return lambda module, recurse, size: bool(policy(module=module, recurse=recurse, nonwrapped_numel=size))


def _inner_first(root: nn.Module) -> Iterator[nn.Module]:
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        seen.add(module)
        for child in module.children():
            if child not in seen:
                yield from visit(child)
        yield module

    return visit(root)


def _without_split_ties(root: nn.Module, units: list[Unit], places: set[tuple[nn.Module, str]]) -> list[Unit]:
    """Drop the units that share a parameter with what is outside them: one unit has to manage it alone."""
    modules = {unit.module for unit in units}
    dropped: dict[nn.Module, str] = {}
    for names in _tied(root, places):
        around = [_units_around(root, name, modules) for name in names]
        if len({chain[-1] if chain else None for chain in around}) == 1:
            continue
        common = set(around[0]).intersection(*around[1:])
        for chain in around:
            depth = max((index + 1 for index, module in enumerate(chain) if module in common), default=0)
            dropped.update(dict.fromkeys(chain[depth:], " = ".join(names)))
    if dropped:
        paths = {module: name for name, module in root.named_modules()}
        listing = "; ".join(f"{paths[module]} ({type(module).__name__}: {tie})" for module, tie in dropped.items())
        rank_zero_warn(
            "These modules share parameters with others outside them, which only one unit can manage, so they are "
            f"sharded with the module around them: {listing}. Leave them out of the policy to silence this.",
            stacklevel=user_stacklevel(),
        )
    return [unit for unit in units if unit.module not in dropped]


def _tied(root: nn.Module, places: set[tuple[nn.Module, str]]) -> list[list[str]]:
    """Names by parameter, of those that have several."""
    names: dict[int, list[str]] = {}
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None and (module, name) not in places:
                names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return [several for several in names.values() if len(several) > 1]


def _units_around(root: nn.Module, parameter: str, units: set[nn.Module]) -> list[nn.Module]:
    """The units on the way from the root to a parameter, outer first."""
    module, chain = root, []
    for step in parameter.split(".")[:-1]:
        module = module._modules[step]  # type: ignore[assignment]
        if module in units:
            chain.append(module)
    return chain


def _classes(root: nn.Module) -> str:
    counts = Counter(type(module).__name__ for module in root.modules() if any(True for _ in module.parameters()))
    names = [f"{name} ({count})" if count > 1 else name for name, count in counts.most_common(_SHOWN)]
    return ", ".join([*names, *(["..."] if len(counts) > _SHOWN else [])]) or "none"
