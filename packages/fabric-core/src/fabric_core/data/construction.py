"""The constructor call that makes an object like a given one: as noted, or as far as its attributes tell."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from fabric_core.data.capture import RUNTIME_ATTRIBUTES, Construction, construction_of
from fabric_core.errors import InvalidTypeError, MisconfigurationException

OPT_OUT = "pass `use_distributed_sampler=False` and put a sampler that knows the ranks into the loader yourself"
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_ABSENT = object()


@dataclass
class Call:
    """Arguments for ``cls(...)``. Positional ones stay positional; ``names`` tells the parameters that they meet."""

    cls: type
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def replace(self, wanted: Mapping[str, Any]) -> None:
        """Change the arguments to those wanted; those that come out the same when left out are left out.

        Raises:
            InvalidTypeError: the constructor has no way to take some of them.
        """
        taken, takes_more = parameters_of(self.cls)
        refused = []
        for name, value in wanted.items():
            if name in self.names[: len(self.args)]:
                self.args[self.names.index(name)] = value
            elif name in self.kwargs:
                self.kwargs[name] = value
            elif name in taken or takes_more:
                if name not in taken or not _same_meaning(taken[name].default, value):
                    self.kwargs[name] = value
            elif not _is_torch_default(value):
                refused.append(name)
        if refused:
            names = ", ".join(f"`{name}`" for name in refused)
            raise InvalidTypeError(
                f"{self.cls.__name__} must be constructed again with {names}, but its __init__ takes neither that nor "
                f"**kwargs. Add {names} or **kwargs to its parameters and hand them to the parent's __init__, or "
                f"{OPT_OUT}."
            )

    def make(self) -> Any:
        """The new object.

        Raises:
            MisconfigurationException: the constructor itself sets an argument that it also is given.
        """
        try:
            return self.cls(*self.args, **self.kwargs)
        except (TypeError, ValueError) as error:
            if not any(clue in str(error) for clue in ("multiple values", "mutually exclusive")):
                raise
            raise MisconfigurationException(
                f"{self.cls.__name__} cannot be constructed again with a sampler of Fabric's, since its __init__ fixes "
                f"an argument that goes with it: {error}. Have `sampler`, `batch_sampler`, `shuffle`, `batch_size` and "
                "`drop_last` as parameters of its __init__ and hand them to the parent's unchanged, or "
                f"{OPT_OUT}."
            ) from error


def _same_meaning(default: object, value: object) -> bool:
    # Never the truth of a sampler: it may have a length, or claim one and raise.
    both_none = _says_nothing(default) and _says_nothing(value)
    return default is value or both_none or (type(value) is int and default == value)


def _is_torch_default(value: object) -> bool:
    return _says_nothing(value) or (type(value) is int and value == 1)  # batch_size=1


def _says_nothing(value: object) -> bool:
    return value is None or value is False


def call_of(obj: object, ignore: Collection[str] = ()) -> Call:
    """The call that made ``obj``, or one found from its attributes; ``ignore``: arguments that will be replaced.

    Raises:
        MisconfigurationException: nothing was noted, and required arguments are not attributes either.
    """
    noted = construction_of(obj)
    return _inferred_call(obj, ignore) if noted is None else _noted_call(type(obj), noted)


def copy_changes(source: object, target: object, ignore: Collection[str] = ()) -> None:
    """Repeat on ``target`` what was done to the attributes of ``source`` after it had been constructed."""
    noted = construction_of(source)
    if noted is None:
        for name, value in vars(source).items():
            if name not in vars(target) and name not in RUNTIME_ATTRIBUTES:
                vars(target)[name] = value
        return
    for name in [name for name in noted.changed if name not in ignore]:
        value = getattr(source, name, _ABSENT)
        if value is not _ABSENT:
            setattr(target, name, value)
        elif hasattr(target, name):
            delattr(target, name)


def _noted_call(cls: type, noted: Construction) -> Call:
    return Call(cls, list(noted.args), dict(noted.kwargs), list(_positional_names(cls)))


def _inferred_call(obj: object, ignore: Collection[str]) -> Call:
    cls, args, kwargs, missing = type(obj), [], {}, []
    taken, _ = parameters_of(cls)
    for name, parameter in taken.items():
        if name in ignore:
            continue
        value = getattr(obj, name, _ABSENT)
        if value is not _ABSENT and parameter.kind is Parameter.POSITIONAL_ONLY:
            args.append(value)
        elif value is not _ABSENT and value is not parameter.default:
            kwargs[name] = value
        elif value is _ABSENT and parameter.default is Parameter.empty:
            missing.append(name)
    if missing:
        listed, example = ", ".join(f"`{name}`" for name in missing), missing[0]
        raise MisconfigurationException(
            f"{cls.__name__} must be constructed again with a sampler of Fabric's, but its arguments {listed} are "
            f"unknown. Set attributes of those names in its __init__, as in `self.{example} = {example}`, or construct "
            f"it after `fabric.launch()`, or {OPT_OUT}."
        )
    return Call(cls, args, kwargs)


def parameters_of(cls: type) -> tuple[dict[str, Parameter], bool]:
    """Named parameters of ``cls(...)``, its parents' where it has ``**kwargs``, and whether it takes any other name."""
    found: dict[str, Parameter] = {}
    takes_more = False
    for parameters in _constructors(cls):
        for parameter in parameters:
            if parameter.kind not in _VARIADIC:
                found.setdefault(parameter.name, parameter)
        takes_more = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
        if not takes_more:
            break
    return found, takes_more


def _positional_names(cls: type) -> list[str]:
    """The parameters that positional arguments meet, in order, as far as signatures tell."""
    for parameters in _constructors(cls):
        kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        # Only a constructor that names no positional parameter at all surely hands *args on as they come.
        if names or all(parameter.kind is not Parameter.VAR_POSITIONAL for parameter in parameters):
            return names
    return []


def _constructors(cls: type) -> Iterator[list[Parameter]]:
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            yield list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
